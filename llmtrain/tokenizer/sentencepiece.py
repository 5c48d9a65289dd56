"""A SentencePiece model (Kudo and Richardson 2018), ``tokenizer.model``, as in Llama 2 and Baichuan 2."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmtrain.base.checks import needing_package
from llmtrain.tokenizer import UNUSED, Tokenizer, TokenizerConfig
from llmtrain.tokenizer.directory import TokenizerDirectory, beside, locate_file, read_bytes
from llmtrain.tokenizer.safe_cuts import cuts_of_pieces
from llmtrain.tokenizer.sentencepiece_model import Algorithm, Piece, PieceKind, SentencePieceModel
from llmtrain.tokenizer.token_bytes import BYTE, SPACE

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

FILE = "tokenizer.model"

# normalizer_spec { add_dummy_prefix: false }, appended to a model: the last of several values holds in a protobuf.
WITHOUT_SPACE_FIRST = b"\x1a\x02\x18\x00"

# Rules that come with the library.  They rewrite characters and their marks, never across the end of a word, but they
# drop control characters that Python counts as white space.
KNOWN_RULES = {"nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"}
PLAIN_SPACES = re.compile(r".*[^\W_](?=[ \t\r\n])", re.DOTALL)

ANCHOR = "a"  # a word of its own before white space


@dataclass(frozen=True)
class SentencePiece(TokenizerConfig):
    """The path of a ``.model`` file, or of a directory that holds ``tokenizer.model``."""

    path: str
    end_of_text: str | None

    def files(self) -> dict[str, bytes]:
        file = self._locate()
        return {FILE: read_bytes(file), **beside(file)}

    def at(self, folder: Path) -> "SentencePiece":
        return replace(self, path=str(folder))

    def _locate(self) -> Path:
        return locate_file(self.path, FILE, "a tokenizer.json is for tokenizer=huggingface")

    def build(self) -> "SentencePieceTokenizer":
        file = self._locate()
        missing = "the sentencepiece package is not installed; pip install 'llmtrain[sentencepiece]'"
        with needing_package(f"tokenizer=sentencepiece: {missing}"):
            import sentencepiece  # noqa: F401
        return SentencePieceTokenizer(file, read_bytes(file), self.end_of_text)


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of the library.

    Control symbols are never found in a text; the library finds user-defined ones.
    """

    def __init__(self, file: Path, data: bytes, end_of_text: str | None = None) -> None:
        self.file, self.data = file, data
        self._processor = self._load(data)
        self.model = self._parse(data)
        self.vocab_size = len(self.model.pieces)
        special = (PieceKind.CONTROL, PieceKind.UNKNOWN)
        self.special_tokens = {piece.text: id for id, piece in enumerate(self.model.pieces) if piece.kind in special}
        self.end_of_text = self._find_end(end_of_text)
        self.bos = bos if (bos := self._processor.bos_id()) >= 0 else None
        self.cuts = _cuts(self.model)
        self.chat_template = TokenizerDirectory.read(file.parent).chat_template()
        self.fingerprint = f"sentencepiece-{hashlib.sha256(data + str(self.end_of_text).encode()).hexdigest()}"
        self._continuing = self._load(data + WITHOUT_SPACE_FIRST) if self.model.adds_space else self._processor

    def encode(self, text: str) -> np.ndarray:
        return _ids(self._processor, text)

    def encode_continuation(self, text: str) -> np.ndarray:
        if self.model.trims_spaces and text[:1].isspace() and self.cuts:
            before = len(_ids(self._processor, ANCHOR))  # after it, a space is not the first of a text, and stays
            return _ids(self._processor, ANCHOR + text)[before:]
        return _ids(self._continuing, text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes[id] if 0 <= id < self.vocab_size else UNUSED for id in ids)

    @cached_property
    def _bytes(self) -> list[bytes]:
        return list(map(_decode, self.model.pieces))

    def _load(self, data: bytes) -> "SentencePieceProcessor":
        import sentencepiece

        try:
            if not data:
                raise RuntimeError("it is empty")
            return sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{self.file}: cut or damaged, not a SentencePiece model: {error}") from error

    def _parse(self, data: bytes) -> SentencePieceModel:
        try:
            return SentencePieceModel.parse(data)
        except ValueError as error:
            raise ValueError(f"{self.file}: not a SentencePiece model: {error}") from error

    def _find_end(self, name: str | None) -> int:
        id = self._processor.eos_id() if name is None else self._processor.piece_to_id(name)
        if name is None and id >= 0:
            return id
        if name is not None and self.model.pieces[id].text == name:
            return id
        names = ", ".join(sorted(self.special_tokens))
        if name is None:
            raise ValueError(
                f"tokenizer.end_of_text=null: {self.file} was trained without an end-of-sentence symbol; name the "
                f"symbol that ends a document; there are {names}"
            )
        raise ValueError(f"tokenizer.end_of_text={name}: not a symbol of {self.file}; there are {names}")


def _cuts(model: SentencePieceModel) -> Sequence[re.Pattern[str]]:
    """Places where the ids of both parts are those of the whole.

    A Unigram model may differ in ties, which rounding decides: the library adds up scores in fp32, whose error after a
    million characters is about 0.25.  The parts are then closer to the model's definition.
    """
    if model.algorithm not in (Algorithm.UNIGRAM, Algorithm.BPE) or model.space_is_suffix or not model.escapes_spaces:
        return ()
    if not model.has_bytes:  # a run of unknown characters is one token
        return ()
    cuts = cuts_of_pieces(
        piece.text for piece in model.pieces if piece.kind not in (PieceKind.CONTROL, PieceKind.UNKNOWN)
    )
    if not model.charsmap:
        return cuts
    return [PLAIN_SPACES] if cuts and model.rules in KNOWN_RULES else ()


def _ids(processor: "SentencePieceProcessor", text: str) -> np.ndarray:
    return np.array(processor.encode(text, out_type=int), np.uint32)


def _decode(piece: Piece) -> bytes:
    if piece.kind is PieceKind.BYTE and (match := BYTE.fullmatch(piece.text)):
        return bytes([int(match[1], 16)])
    is_special = piece.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)
    return (piece.text if is_special else piece.text.replace(SPACE, " ")).encode()
