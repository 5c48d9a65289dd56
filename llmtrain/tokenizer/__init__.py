"""The contract of tokenizers: text to token ids and back, without a network."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from llmtrain.base.options import Option

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
    bos: int | None = None  # the id that begins a text, for models that are trained with one
    special_tokens: Mapping[str, int]  # ids of tokens that never stand for text, by name, such as ``<|im_start|>``
    chat_template: str | None = None  # Jinja source that came with the tokenizer
    fingerprint: str  # changes whenever the mapping from text to ids changes; the data cache is keyed by it
    cuts: Sequence[re.Pattern[str]] = CUTS  # places at which a text may be cut: the parts have the ids of the whole

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, uint32, 1-dimensional.  Special tokens in the text are ordinary characters.

        No id is added before or after.  Must be safe to call from several threads.
        """

    def encode_continuation(self, text: str) -> np.ndarray:
        """As ``encode``, for a text that continues another: without the space that SentencePiece puts first.

        After one of ``cuts`` the ids are the same as in the whole text.
        """
        return self.encode(text)

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
    """Contract of ``tokenizer=...``."""

    @abstractmethod
    def build(self) -> Tokenizer:
        """Load the tokenizer.  Raises ValueError, naming the file, if it cannot be read or used."""
