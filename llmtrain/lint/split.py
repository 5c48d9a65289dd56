"""Validation data that are not a fair sample: too many or too few, or of another kind than the training data."""

from collections.abc import Iterator

import numpy as np

from llmtrain.base.format import percent
from llmtrain.data.order.document_split import Split
from llmtrain.data.sequences import Sequences, Stream
from llmtrain.lint.case import Case, Finding, warning
from llmtrain.lint.overlap import source, spread

MOST_OFF = 1.25  # times the share that was asked for, or its inverse
SEQUENCES = 512  # of the training and of the validation data, that are compared
TOKENS = 1 << 17  # the same in tokens, where sequences are long
FEWEST_BYTES = 1 << 12  # of the validation data; fewer differ by chance
# The total variation distance of the frequencies of bytes: 0.1 to 0.2 between texts of one language, prose and code;
# 0.2 to 0.3 between two languages of the same alphabet, 0.9 between alphabets.
UNLIKE = 0.25


def share_of_validation(case: Case) -> Iterator[Finding]:
    """A share of the tokens far from ``data.validation_fraction``."""
    data, validation = case.run.data, case.corpus.validation
    fraction, split = getattr(data, "validation_fraction", 0), getattr(data, "split", None)
    if not isinstance(validation, Stream) or not fraction or split is None:  # without a choice nothing can be done
        return
    if "validation_fraction" in data.unread(case.facts):
        return
    share = validation.tokens / (validation.tokens + case.corpus.train.tokens)
    if not 1 / MOST_OFF < share / fraction < MOST_OFF:
        remedy = "documents are of very different sizes, or equal; data.validation_path=PATH names text for validation"
        if split is Split.documents:
            remedy = "documents are of very different sizes; data.split=tokens meets the share"
        yield warning(
            "data.validation_fraction",
            f"data.validation_fraction={fraction:g}: {percent(share)} of the tokens validate, since {remedy}",
        )


def unlike_validation(case: Case) -> Iterator[Finding]:
    """Validation text of another language or kind than the training text."""
    validation = case.corpus.validation
    if not isinstance(validation, Stream) or not case.evaluates:
        return
    ours, others = (_bytes_of(case, sequences) for sequences in (validation, case.corpus.train))
    if ours.sum() < FEWEST_BYTES:
        return
    distance = float(np.abs(ours / ours.sum() - others / others.sum()).sum() / 2)
    if distance > UNLIKE:
        key, setting = source(case.run.data)
        yield warning(
            key,
            f"{setting}: the validation text is of another language or kind than the training text (their bytes differ "
            f"in {percent(distance)}), so its loss says little about training; a share of every file validates with "
            "data.split=tokens, or name other text with data.validation_path=PATH",
        )


def _bytes_of(case: Case, sequences: Sequences) -> np.ndarray:
    """The number of each byte in a sample of ``sequences``: (256,)."""
    at_most = max(1, min(SEQUENCES, TOKENS // sequences.sequence_length))
    tokens = sequences.gather(spread(len(sequences), at_most)).inputs.ravel()
    text = case.tokenizer.decode_bytes(tokens[tokens != case.tokenizer.end_of_text].tolist())
    return np.bincount(np.frombuffer(text, np.uint8), minlength=256)
