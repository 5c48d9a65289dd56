"""Text to token ids and back, without a network."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Tokenizer(ABC):
    """What the program knows of a tokenizer."""

    vocab_size: int  # ids are 0 … vocab_size - 1
    end_of_text: int  # the id that ends a document
    fingerprint: str  # changes whenever the mapping from text to ids changes; the data cache is keyed by it

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, uint32, 1-dimensional.  Special tokens in the text are ordinary characters.

        Must be safe to call from several threads.
        """

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes behind ``ids``, special tokens as their names; a cut multi-byte character stays cut."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text behind ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class TokenizerConfig(ABC):
    """Contract of ``tokenizer=...``."""

    @abstractmethod
    def build(self) -> Tokenizer:
        """Load the tokenizer."""
