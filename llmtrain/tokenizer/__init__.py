"""The contract of tokenizers: text to token ids and back, without a network."""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np

from llmtrain.base.options import Option
from llmtrain.tokenizer.marked_text import MarkedEncoder as MarkedEncoder
from llmtrain.tokenizer.marked_text import plain_text_encoder, segment_encoder

# Places between a letter or digit and a character that cannot continue its word: white space, or punctuation.  The
# patterns of GPT-2, cl100k and o200k all end a match there and none of them looks back, so both sides split as in the
# whole text.
WORD_ENDS = (r"[^\W_](?=\s)", r"[^\W_](?=[!-&(-/:-@[-^`{-~—…、。！（），：；？])")

# As patterns to match from the start of a text, greedily: the match ends at the last such place.
CUTS = [re.compile(f".*{end}", re.DOTALL) for end in WORD_ENDS]

LONGEST_WORD = 1 << 12  # characters that are merged together

UNUSED = "\N{REPLACEMENT CHARACTER}".encode()  # the bytes of an id without a token


def split_long_words(text: str) -> list[str]:
    """Cut ``text`` within stretches far longer than any word, whose merging would take time quadratic in their length.

    A stretch of more than ``LONGEST_WORD`` characters without any of ``WORD_ENDS`` is cut after each ``LONGEST_WORD``
    of them, and at the cuts the ids may differ from those of the whole; any other text stays whole.
    """
    parts, begin, word = [], 0, 0  # of the current part; the last known end of a word
    for at in range(LONGEST_WORD, len(text), LONGEST_WORD):
        found = _last_word_end(text, max(at - LONGEST_WORD, word), min(at + 1, len(text)))
        if found > word:
            word = found
        while at - max(begin, word) >= LONGEST_WORD:
            cut = max(begin, word) + LONGEST_WORD
            parts.append(text[begin:cut])
            begin = cut
    parts.append(text[begin:])
    return parts


def _last_word_end(text: str, begin: int, end: int) -> int:
    """The end of the last word of ``text`` between ``begin`` and ``end``; 0 if there is none."""
    return max((found.end() for cut in CUTS if (found := cut.match(text, begin, end))), default=0)


class Tokenizer(ABC):
    """Contract of a tokenizer."""

    vocab_size: int  # ids are 0 … vocab_size - 1
    end_of_text: int  # the id that ends a document
    bos: int | None = None  # the id that the tokenizer puts before a text; None: none, even if it has a token for it
    prefix: tuple[int, ...] = ()  # the ids before every document in training, and before every prompt
    special_tokens: Mapping[str, int]  # ids of tokens that never stand for text, by name, such as ``<|im_start|>``
    named_tokens: Mapping[str, str] = MappingProxyType({})  # names of tokens by role, such as ``bos_token``
    chat_template: str | None = None  # Jinja source that came with the tokenizer
    fingerprint: str  # changes whenever the mapping from text to ids changes; the data cache is keyed by it
    cuts: Sequence[re.Pattern[str]] = CUTS  # places at which a text may be cut: the parts have the ids of the whole

    @property
    def text_size(self) -> int:
        """The ids below this one are those that text without added tokens can have."""
        added = set(self.special_tokens.values())
        return next((id + 1 for id in range(self.vocab_size - 1, -1, -1) if id not in added), 0)

    @property
    def begin(self) -> tuple[int, ...]:
        """The ids that begin a conversation, or a text to classify."""
        return self.prefix or (() if self.bos is None else (self.bos,))

    @property
    def begin_names(self) -> str:
        """The names of ``begin``."""
        names = {id: name for name, id in self.special_tokens.items()}
        return "".join(names.get(id, "") for id in self.begin)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, uint32, 1-dimensional.  Special tokens in the text are ordinary characters.

        No id is added before or after.  Must be safe to call from several threads.
        """

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that is to be continued, as of the beginning of a document in training."""
        ids = self.encode(text)
        self.check_ids(ids)
        return [*self.prefix, *ids.tolist()]

    def limited(self, rows: int) -> Self:
        """The same tokenizer, of a model with ``rows`` rows: ids that no text has need none.

        Raises ValueError if the token that ends a document, or one put before it, has none.
        """
        found = copy.copy(self)
        found.vocab_size = rows
        found.check_ids(np.array([self.end_of_text, *self.begin]))
        return found

    def check_ids(self, ids: np.ndarray) -> None:
        """Raise ValueError, naming the token, if an id is beyond the vocabulary."""
        if (largest := int(ids.max(initial=0))) >= self.vocab_size:
            names = {id: name for name, id in self.special_tokens.items()}
            name = names.get(largest) or self.decode([largest])
            raise ValueError(
                f"model.vocab_size={self.vocab_size}: the token {name!r} has the id {largest}, for which the model has "
                "no row; take text and a template without it, or weights whose embedding has a row for it "
                "(transformers' resize_token_embeddings)"
            )

    def encode_continuation(self, text: str) -> np.ndarray:
        """As ``encode``, for a text that continues another: without the space that SentencePiece puts first.

        After one of ``cuts`` the ids are the same as in the whole text.
        """
        return self.encode(text)

    def marked_encoder(self, marks: Mapping[str, int]) -> MarkedEncoder:
        """An encoder of text with tokens among it, as transformers encodes a text that holds their names.

        ``marks``: ids of the tokens by name.  Where a name stands in a text it is text, and not the token.
        """
        return segment_encoder(plain_text_encoder(self, marks), self.begin)

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ``ids``, with special tokens as their names; a cut multi-byte character stays cut.

        The bytes of a list are those of its ids concatenated, so text can be shown while it is generated.  Hence the
        space that SentencePiece puts before a text is kept.  Ids without a token are U+FFFD.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class TokenizerConfig(Option, ABC):
    """Contract of ``tokenizer=...``.

    A run keeps a copy of the files that its tokenizer is made of: :meth:`files` are their contents, and :meth:`at` is
    the same option for the copy.  An option that needs no files has none.
    """

    def files(self) -> dict[str, bytes]:
        """The files by the names that :meth:`at` finds them under.  Raises ValueError as :meth:`build` does."""
        return {}

    def at(self, folder: Path) -> "TokenizerConfig":
        """The option that reads :meth:`files` from ``folder``."""
        return self

    @abstractmethod
    def build(self) -> Tokenizer:
        """Load the tokenizer.  Raises ValueError, naming the file, if it cannot be read or used."""
