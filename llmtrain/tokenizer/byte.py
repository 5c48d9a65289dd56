"""Bytes as tokens: nothing to train or load, any text, a small vocabulary for small models."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from llmtrain.tokenizer import UNUSED, Tokenizer, TokenizerConfig

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Byte(TokenizerConfig):
    """257 ids: the 256 bytes of UTF-8 and 256, which ends a document."""

    def build(self) -> "ByteTokenizer":
        return ByteTokenizer()


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes of a text."""

    vocab_size = 257
    end_of_text = 256
    special_tokens = MappingProxyType({END_OF_TEXT: 256})
    fingerprint = "byte-1"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(_decode_token, ids))


def _decode_token(token: int) -> bytes:
    if token < 256:
        return bytes([token])
    return END_OF_TEXT.encode() if token == 256 else UNUSED
