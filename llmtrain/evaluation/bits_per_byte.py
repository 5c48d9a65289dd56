"""Bits per byte: a validation loss that does not depend on the tokenizer."""

import math

import numpy as np

from llmtrain.data import IGNORE
from llmtrain.data.sequences import Sequences
from llmtrain.tokenizer import Tokenizer

CHUNK = 1 << 20  # tokens counted at once


def bits_per_byte(loss: float, target_bytes: float) -> float | None:
    """A mean ``loss`` of nats a target as bits a byte; None if it is not finite, or the targets stand for no text."""
    return loss / math.log(2) / target_bytes if target_bytes and math.isfinite(loss) else None


def mean_target_bytes(sequences: Sequences, tokenizer: Tokenizer, max_sequences: int | None) -> float:
    """The bytes of text that a target of the first ``max_sequences`` (None: all) stands for, on average.

    Special tokens, such as the end of a document, stand for none.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    end = len(sequences) if max_sequences is None else min(len(sequences), max_sequences)
    rows = max(1, CHUNK // sequences.sequence_length)
    for start in range(0, end, rows):
        targets = sequences.gather(np.arange(start, min(start + rows, end))).targets
        counts += np.bincount(targets[targets != IGNORE], minlength=len(counts))
    special = {*tokenizer.special_tokens.values(), tokenizer.end_of_text}
    text = [id for id in np.flatnonzero(counts).tolist() if id not in special]
    return sum(int(counts[id]) * len(tokenizer.decode_bytes([id])) for id in text) / max(int(counts.sum()), 1)
