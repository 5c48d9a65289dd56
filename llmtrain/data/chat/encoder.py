"""Rendered conversations as token ids, with the targets of what is trained."""

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from llmtrain.data import IGNORE
from llmtrain.data.chat.special_tokens import special_tokens
from llmtrain.data.chat.split_encoder import EncodedConversation, SplitEncoder
from llmtrain.data.chat.template import ChatTemplate, PartKind, RenderedPart
from llmtrain.tokenizer import MarkedEncoder, Tokenizer


class ConversationEncoder:
    """Encoder of rendered parts: the one way from a conversation to ids, in training, in chat and in the export.

    The whole conversation is encoded as one text with special tokens in it, so its ids are those of transformers'
    ``apply_chat_template``.  A token is a target if any of its characters is trained; only where the text around a
    response runs into its first or last token is another character part of that (as in transformers'
    ``return_assistant_tokens_mask``).

    Args:
        tokenizer: the tokenizer.
        template: the template that rendered the parts; its own special tokens are found too.
        split_at_responses: encode each stretch between special tokens and borders of responses by itself, so that no
            token spans such a border; the ids of a text that follows a special token differ from transformers' then.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None = None, *, split_at_responses: bool = False
    ) -> None:
        self.tokenizer, self.split_at_responses = tokenizer, split_at_responses
        self.special = special_tokens(tokenizer, () if template is None else template.special_names())
        names = sorted(self.special, key=len, reverse=True)  # the longest wins
        self.pattern = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    @cached_property
    def _encode_pieces(self) -> MarkedEncoder:
        return self.tokenizer.marked_encoder(self.special)

    def __call__(self, parts: Sequence[RenderedPart]) -> EncodedConversation:
        if self.split_at_responses:
            return SplitEncoder(self.tokenizer, self.special, self._pieces, self.pattern)(parts)
        pieces: list[str | int] = []
        marks: list[np.ndarray] = []  # of each place of the pieces
        ends: list[int] = []  # places where the target is the end of the text instead
        place = 0
        for part in parts:
            new = self._pieces(part)
            size = sum(1 if isinstance(piece, int) else len(piece) for piece in new)
            if part.ends_text and size:
                ends.append(place)
            marks.append(np.full(size, part.is_trained and not part.ends_text))
            pieces += new
            place += size
        ids, starts, stops = self._encode_pieces(pieces)
        mark = np.concatenate([*marks, np.zeros(1, bool)])
        trained = np.concatenate([[0], np.cumsum(mark)])
        is_target = trained[np.minimum(np.maximum(stops, starts + 1), place)] > trained[np.minimum(starts, place)]
        targets = np.where(is_target, ids.astype(np.int64), IGNORE)
        for end in ends:  # the first token of the part
            targets[np.searchsorted(starts, end)] = self.tokenizer.end_of_text
        borders = np.union1d(np.flatnonzero(mark[1:-1] != mark[:-2]) + 1, ends)
        spanned = np.searchsorted(borders, starts, side="right") < np.searchsorted(borders, stops, side="left")
        return EncodedConversation(ids, targets, bool(spanned.any()))

    def text(self, parts: Sequence[RenderedPart]) -> str:
        """The rendered text, with special tokens as their names."""
        names = {id: name for name, id in self.special.items()}
        return "".join(
            names[piece] if isinstance(piece, int) else piece for part in parts for piece in self._pieces(part)
        )

    def prompt(self, parts: Sequence[RenderedPart]) -> list[int]:
        """The ids of a prompt."""
        ids = self(parts).ids
        self.tokenizer.check_ids(ids)
        return ids.tolist()

    def stops(self, template: ChatTemplate) -> tuple[frozenset[int], tuple[str, ...]]:
        """The ids that end a response, and strings where the tokenizer has no token of that name."""
        ids = {self.special[name] for name in template.stop if name in self.special}
        return frozenset({*ids, self.tokenizer.end_of_text}), tuple(s for s in template.stop if s not in self.special)

    def _pieces(self, part: RenderedPart) -> list[str | int]:
        match part.kind:
            case PartKind.begin:
                return list(self.tokenizer.begin)
            case PartKind.end:
                return [self.tokenizer.end_of_text]
            case PartKind.markup if self.pattern is not None:
                pieces = self.pattern.split(part.text)
                return [self.special[piece] if i % 2 else piece for i, piece in enumerate(pieces) if piece]
        return [part.text]
