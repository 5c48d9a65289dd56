"""Rendered conversations as token ids, with the targets of what is trained."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from llmtrain.data import IGNORE
from llmtrain.data.chat.special_tokens import special_tokens
from llmtrain.data.chat.template import ChatTemplate, PartKind, RenderedPart
from llmtrain.tokenizer import Tokenizer


class EncodedConversation(NamedTuple):
    """A rendered conversation as ids."""

    ids: np.ndarray  # (tokens,) uint32
    targets: np.ndarray  # (tokens,) int64: the token itself where it is trained, else IGNORE


class ConversationEncoder:
    """Encoder of rendered parts.

    Each stretch of text between special tokens and borders of responses is encoded by itself.  So the targets are
    exact, and a prompt has the same ids in training and in generation.  No merge of the tokenizer spans such a border,
    as it might in a text that is encoded as a whole.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer, () if template is None else template.special_names())
        names = sorted(self.special, key=len, reverse=True)  # the longest wins
        self.pattern = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

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

    def prompt(self, parts: Sequence[RenderedPart]) -> list[int]:
        """The ids of a prompt."""
        return self(parts).ids.tolist()

    def stops(self, template: ChatTemplate) -> tuple[frozenset[int], tuple[str, ...]]:
        """The ids that end a response, and strings where the tokenizer has no token of that name."""
        ids = {self.special[name] for name in template.stop if name in self.special}
        return frozenset({*ids, self.tokenizer.end_of_text}), tuple(s for s in template.stop if s not in self.special)

    def _encode(self, text: str, has_begun: bool) -> np.ndarray:
        """Encode text in which names of special tokens are text, even if the tokenizer finds those in any text."""
        ids = (self.tokenizer.encode_continuation if has_begun else self.tokenizer.encode)(text)
        found = [] if self.pattern is None else [m for m in self.pattern.finditer(text) if len(m[0]) > 1]
        if not found or not np.isin(ids, [self.special[match[0]] for match in found]).any():
            return ids
        borders = [0, *(match.start() + 1 for match in found), len(text)]  # no name is complete between two of them
        stretches = [text[start:end] for start, end in pairwise(borders) if start < end]
        return np.concatenate([self._encode(each, has_begun or i > 0) for i, each in enumerate(stretches)])

    def _pieces(self, part: RenderedPart) -> list[str | int]:
        match part.kind:
            case PartKind.begin:
                return [] if self.tokenizer.bos is None else [self.tokenizer.bos]
            case PartKind.end:
                return [self.tokenizer.end_of_text]
            case PartKind.markup if self.pattern is not None:
                pieces = self.pattern.split(part.text)
                return [self.special[piece] if i % 2 else piece for i, piece in enumerate(pieces) if piece]
        return [part.text]
