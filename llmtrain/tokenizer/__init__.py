"""Text to token ids and back, without a network."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from llmtrain.base.options import Option

# Between a letter or digit and a character that cannot go on with its word: white space, or punctuation.  The patterns
# of GPT-2, cl100k and o200k all end a match there and none of them looks back, so both sides split as the whole would.
WORD_ENDS = (r"[^\W_](?=\s)", r"[^\W_](?=[!-&(-/:-@[-^`{-~—…、。！（），：；？])")

# As patterns to match from the start of a text, greedily: the match ends at the last such place.
CUTS = [re.compile(f".*{end}", re.DOTALL) for end in WORD_ENDS]

UNUSED = "\N{REPLACEMENT CHARACTER}".encode()  # stands for an id without a token


class Tokenizer(ABC):
    """What the program knows of a tokenizer."""

    vocab_size: int  # ids are 0 … vocab_size - 1
    end_of_text: int  # the id that ends a document
    bos: int | None = None  # the id that a text begins with, where models are trained so
    special_tokens: Mapping[str, int]  # names of tokens that are no text, such as ``<|im_start|>``
    chat_template: str | None = None  # Jinja source that came with the tokenizer
    fingerprint: str  # changes whenever the mapping from text to ids changes; the data cache is keyed by it
    cuts: Sequence[re.Pattern[str]] = CUTS  # those at which a text may be cut: its parts have the ids of the whole

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, uint32, 1-dimensional.  Special tokens in the text are ordinary characters.

        Nothing is put before or after it.  Must be safe to call from several threads.
        """

    def encode_continuation(self, text: str) -> np.ndarray:
        """As ``encode``, of a text that goes on from another: without the space that SentencePiece begins with.

        After one of ``cuts`` the ids are those that the text has in the whole.
        """
        return self.encode(text)

    def encode_with_special(self, text: str) -> np.ndarray:
        """As ``encode``, but names of ``special_tokens`` become their ids.  For templates, never for data."""
        if not self.special_tokens:
            return self.encode(text)
        names = sorted(self.special_tokens, key=len, reverse=True)  # the longest wins
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = [np.array([self.special_tokens[part]], np.uint32) if i % 2 else self.encode(part)
               for i, part in enumerate(parts)]  # fmt: skip
        return np.concatenate(ids)

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes behind ``ids``, special tokens as their names; a cut multi-byte character stays cut.

        Those of a list are those of its ids one after the other, so that a text can be shown while it is made.
        Hence the space that SentencePiece begins a text with is there.  Ids without a token are U+FFFD.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text behind ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class TokenizerConfig(Option, ABC):
    """Contract of ``tokenizer=...``."""

    @abstractmethod
    def build(self) -> Tokenizer:
        """Load the tokenizer.  Raises ValueError, naming the file, if it cannot be read or used."""
