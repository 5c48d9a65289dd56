"""Conversations whose tokens end at the borders of responses: ``data.split_at_responses=true``."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from llmtrain.data import IGNORE
from llmtrain.data.chat.template import PartKind, RenderedPart
from llmtrain.tokenizer import Tokenizer


class EncodedConversation(NamedTuple):
    """A rendered conversation as ids."""

    ids: np.ndarray  # (tokens,) uint32
    targets: np.ndarray  # (tokens,) int64: the token itself where it is trained, else IGNORE
    spans_border: bool = False  # a token holds the end of a response, or its beginning, and text around it


class SplitEncoder:
    """Encoder of rendered parts.

    Each stretch of text between special tokens and borders of responses is encoded by itself, as the continuation of a
    text.  No merge of the tokenizer spans such a border, as it might in a text that is encoded as a whole.

    Args:
        tokenizer: the tokenizer.
        special: the special tokens, by name.
        pieces: the text of a part and the special tokens in it.
        pattern: finds names of ``special``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special: Mapping[str, int],
        pieces: Callable[[RenderedPart], list[str | int]],
        pattern: re.Pattern[str] | None,
    ) -> None:
        self.tokenizer, self.special, self._pieces, self.pattern = tokenizer, special, pieces, pattern

    def __call__(self, parts: Sequence[RenderedPart]) -> EncodedConversation:
        ids: list[np.ndarray] = []
        all_targets: list[np.ndarray] = []
        run = ""  # text not encoded yet
        is_trained = ends_text = has_begun = False

        def add(new: np.ndarray) -> None:
            nonlocal has_begun
            has_begun |= part.kind is not PartKind.begin  # the token that begins a text is not part of it
            targets = new.astype(np.int64) if is_trained else np.full(len(new), IGNORE)
            if ends_text and len(new):
                targets[0] = self.tokenizer.end_of_text
                targets[1:] = IGNORE
            ids.append(new)
            all_targets.append(targets)

        def flush() -> None:
            nonlocal run
            if run:
                add(self._encode(run, has_begun))
            run = ""

        for part in parts:
            if part.is_apart or part.is_trained != is_trained:
                flush()
            is_trained, ends_text = part.is_trained, part.ends_text
            for piece in self._pieces(part):
                if isinstance(piece, str):
                    run += piece
                else:
                    flush()
                    add(np.array([piece], np.uint32))
            if part.is_apart:
                flush()
        flush()
        if not ids:
            return EncodedConversation(np.empty(0, np.uint32), np.empty(0, np.int64))
        return EncodedConversation(np.concatenate(ids), np.concatenate(all_targets))

    def _encode(self, text: str, has_begun: bool) -> np.ndarray:
        """Encode text in which names of special tokens are text, even if the tokenizer finds those in any text."""
        ids = (self.tokenizer.encode_continuation if has_begun else self.tokenizer.encode)(text)
        found = [] if self.pattern is None else [m for m in self.pattern.finditer(text) if len(m[0]) > 1]
        if not found or not np.isin(ids, [self.special[match[0]] for match in found]).any():
            return ids
        borders = [0, *(match.start() + 1 for match in found), len(text)]  # no name is complete between two of them
        stretches = [text[start:end] for start, end in pairwise(borders) if start < end]
        return np.concatenate([self._encode(each, has_begun or i > 0) for i, each in enumerate(stretches)])
