"""Bytes as tokens: nothing to learn or load, any text, a small vocabulary for small models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain.tokenizer import Tokenizer, TokenizerConfig


@dataclass(frozen=True)
class Byte(TokenizerConfig):
    """257 ids: the 256 bytes of UTF-8 and 256, which ends a document."""

    def build(self) -> "ByteTokenizer":
        return ByteTokenizer()


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes of a text."""

    vocab_size = 257
    end_of_text = 256
    fingerprint = "byte-1"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(b"<|endoftext|>" if token == self.end_of_text else bytes([token]) for token in ids)
