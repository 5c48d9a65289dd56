"""The bytes of each token of a ``tokenizer.json``, from the decoder in the file."""

import re
from collections.abc import Mapping
from typing import Any

SPACE = "▁"  # a space in SentencePiece's vocabularies and those derived from them
BYTE = re.compile("<0x([0-9A-F]{2})>")

# Replacements of BERT's decoder for English (tokenizers, decoders/wordpiece.rs).
TIDY = {
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " do not": " don't",
    " 's": "'s", " 've": "'ve", " 're": "'re",
}  # fmt: skip

KNOWN = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "BPEDecoder", "WordPiece", "Fuse", "Strip"}


def _byte_level_alphabet() -> list[str]:
    """A printable character for each byte: GPT-2's ``bytes_to_unicode`` (Radford et al. 2019, encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


ALPHABET = _byte_level_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def to_byte_level(token: bytes) -> str:
    """A token of bytes as byte-level BPE writes it in JSON."""
    return "".join(map(ALPHABET.__getitem__, token))


def flatten(node: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """The steps of a component without nesting; ``parts`` is the key that holds the steps of a sequence."""
    if node is None:
        return []
    if node.get("type") != "Sequence":
        return [node]
    return [step for inner in node[parts] for step in flatten(inner, parts)]


class TokenDecoder:
    """Bytes of a token, each token by itself.

    Steps at the ends of a whole text, such as stripping the first space, are left out.  Raises ValueError for a decoder
    that needs several tokens at once.
    """

    def __init__(self, node: Mapping[str, Any] | None) -> None:
        self.steps = flatten(node, "decoders")
        for step in self.steps:
            if step["type"] not in KNOWN or (step["type"] == "Replace" and "String" not in step["pattern"]):
                raise ValueError(f"its decoder has a step {step['type']} that depends on more than one token")

    def __call__(self, token: str) -> bytes:
        if not self.steps:  # without steps the library puts spaces between tokens
            return f" {token}".encode()
        for step in self.steps:
            match step["type"]:
                case "ByteLevel":
                    try:
                        return bytes(map(BYTE_OF.__getitem__, token))
                    except KeyError:  # an added token, in plain characters
                        return token.encode()
                case "ByteFallback":
                    if match := BYTE.fullmatch(token):
                        return bytes([int(match[1], 16)])
                case "Replace":
                    token = token.replace(step["pattern"]["String"], step["content"])
                case "Metaspace":
                    token = token.replace(step["replacement"], " ")
                case "BPEDecoder":
                    token = token.replace(step["suffix"], " ")
                case "WordPiece":
                    prefix = step["prefix"]
                    token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
                    if step["cleanup"]:
                        for rough, tidy in TIDY.items():
                            token = token.replace(rough, tidy)
        return token.encode()
