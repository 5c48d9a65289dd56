"""Byte-level BPE over merge ranks, for the options ``gpt2`` and ``tiktoken``."""

import binascii
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from llmtrain.tokenizer import CUTS, LONGEST_WORD, UNUSED, Tokenizer, split_long_words

END_OF_TEXT = "<|endoftext|>"

# The patterns that split a text before merging, as published with each encoding (https://github.com/openai/tiktoken,
# tiktoken_ext/openai_public.py).
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}


def for_oniguruma(pattern: str) -> str:
    """Translate ``pattern`` for the engine of the tokenizers library, where ``{1,3}+`` repeats and ``$`` ends a line.

    An atom with a bounded possessive count becomes an atomic group, which both engines match alike.
    """
    atom = r"\\p\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\\[\](){}|]"
    pattern = re.sub(rf"({atom})(\{{\d+(?:,\d*)?\}})\+", r"(?>\1\2)", pattern)
    return re.sub(r"(\\.|\[(?:\\.|[^\]\\])*\])|\$", lambda match: match[1] or r"\z", pattern)


class BPE(Tokenizer):
    """A :class:`tiktoken.Encoding` as a tokenizer."""

    def __init__(self, encoding: tiktoken.Encoding, end_of_text: str = END_OF_TEXT) -> None:
        # tiktoken's README builds encodings from these three private attributes; there are no public ones.
        special_tokens: dict[str, int] = encoding._special_tokens
        self.encoding = encoding
        self.vocab_size = encoding.max_token_value + 1
        self.end_of_text = special_tokens[end_of_text]
        self.special_tokens = dict(special_tokens)
        self.cuts = CUTS if encoding._pat_str in PATTERNS.values() else ()  # an unknown pattern may split differently
        self.fingerprint = _fingerprint(encoding._mergeable_ranks, encoding._pat_str, special_tokens, self.end_of_text)

    def encode(self, text: str) -> np.ndarray:
        parts = [text] if len(text) <= LONGEST_WORD else split_long_words(text)
        ids = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        try:
            return self.encoding.decode_bytes(ids)
        except KeyError:  # some encodings leave ids unused, which an untrained model may generate
            return b"".join(map(self._decode_token, ids))

    def _decode_token(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return UNUSED


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the merge ranks in a ``.tiktoken`` file: a line for each token, its bytes in base64 and its rank.

    Raises ValueError, naming the file, if it cannot be read or used.
    """
    try:
        fields = path.read_bytes().split()
        tokens = [binascii.a2b_base64(token, strict_mode=True) for token in fields[::2]]
        values = list(map(int, fields[1::2]))
        ranks = dict(zip(tokens, values, strict=True))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a .tiktoken file (lines of a token in base64 and its rank): {error}") from error
    if len(set(values)) != len(ranks) or min(values, default=0) < 0:
        raise ValueError(f"{path}: not a .tiktoken file: a token or a rank occurs twice, or a rank is negative")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path}: cut or damaged: byte {missing[0]:#04x} has no token, so not every text has tokens")
    return ranks


def write_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """The content of a ``.tiktoken`` file with ``ranks``."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    return b"".join(binascii.b2a_base64(token, newline=False) + b" %d\n" % ranks[token] for token in ordered)


def _fingerprint(ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int], end_of_text: int) -> str:
    """sha256 over everything that decides the ids of a text."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    digest = hashlib.sha256(repr((pattern, sorted(special_tokens.items()), end_of_text)).encode())
    digest.update(np.array([ranks[token] for token in tokens], dtype="<u4").tobytes())
    digest.update(np.array([len(token) for token in tokens], dtype="<u4").tobytes())
    digest.update(b"".join(tokens))
    return f"bpe-{digest.hexdigest()}"
