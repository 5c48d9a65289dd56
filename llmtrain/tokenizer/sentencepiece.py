"""A SentencePiece model (Kudo and Richardson 2018), ``tokenizer.model``, as in Llama 2 and Baichuan 2."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llmtrain.base.checks import needing_package
from llmtrain.tokenizer import UNUSED, Tokenizer
from llmtrain.tokenizer.as_transformers import prepend_scheme
from llmtrain.tokenizer.directory import TokenizerDirectory, read_bytes
from llmtrain.tokenizer.in_directory import TokenizerInDirectory
from llmtrain.tokenizer.marked_text import MarkedEncoder, MarkedIds, segment_encoder
from llmtrain.tokenizer.safe_cuts import cuts_of_pieces
from llmtrain.tokenizer.sentencepiece_model import Algorithm, Piece, PieceKind, SentencePieceModel, parse_spans
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
class SentencePiece(TokenizerInDirectory):
    """The path of a ``.model`` file, or of a directory that holds ``tokenizer.model``."""

    file_name: ClassVar[str] = FILE
    if_missing: ClassVar[str] = "a tokenizer.json is for tokenizer=huggingface"

    def build(self) -> "SentencePieceTokenizer":
        file = self.locate()
        missing = "the sentencepiece package is not installed; pip install 'llmtrain[sentencepiece]'"
        with needing_package(f"tokenizer=sentencepiece: {missing}"):
            import sentencepiece  # noqa: F401
        return SentencePieceTokenizer(file, read_bytes(file), self.end_of_text, self.version)


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of the library.

    Control symbols are never found in a text; the library finds user-defined ones.  Between control symbols each
    stretch of text is encoded as a text of its own, so that a space is put before it, unless ``legacy`` or
    ``add_prefix_space`` in ``tokenizer_config.json`` say otherwise (``scheme``).  ``version``: see
    ``conf/tokenizer/sentencepiece.yaml``.
    """

    def __init__(self, file: Path, data: bytes, end_of_text: str | None = None, version: int = 2) -> None:
        self.file, self.data = file, data
        self._processor = self._load(data)
        self.model = self._parse(data)
        self.vocab_size = len(self.model.pieces)
        special = (PieceKind.CONTROL, PieceKind.UNKNOWN)
        self.special_tokens = {piece.text: id for id, piece in enumerate(self.model.pieces) if piece.kind in special}
        self.end_of_text = self._find_end(end_of_text)
        self.bos = bos if (bos := self._processor.bos_id()) >= 0 else None
        directory = TokenizerDirectory.read(file.parent)
        self.scheme: str | None = None
        if version > 1:
            if directory.tokenizer_config.get("add_bos_token") is not True:
                self.bos = None
            elif self.bos is not None:
                self.prefix = (self.bos,)
            if {"legacy", "add_prefix_space"} & directory.tokenizer_config.keys():
                self.scheme = prepend_scheme(directory)
            self.named_tokens = self._name_roles(directory)
        self.cuts = _cuts(self.model)
        self.chat_template = directory.chat_template()
        more = "".join(f",{each}" for each in (self.prefix, self.scheme) if each)
        self.fingerprint = f"sentencepiece-{hashlib.sha256(data + f'{self.end_of_text}{more}'.encode()).hexdigest()}"
        self._continuing = self._load(data + WITHOUT_SPACE_FIRST) if self.model.adds_space else self._processor

    def encode(self, text: str) -> np.ndarray:
        return _ids(self._first(text, 0), text)

    def _first(self, text: str, place: int) -> "SentencePieceProcessor":
        """The processor of a stretch of text between control symbols, which begins at ``place`` of the whole."""
        match self.scheme:
            case None:
                return self._processor
            case "first" if place:
                return self._continuing
            case "first" | "always":
                return self._continuing if text[:1] in (" ", SPACE) else self._processor
        return self._continuing

    def marked_encoder(self, marks: Mapping[str, int]) -> MarkedEncoder:
        names = sorted((name for name in {**self.special_tokens, **marks} if len(name) > 1), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, names)))
        every = {**self.special_tokens, **marks}

        def encode(text: str, place: int) -> MarkedIds:
            found = _with_places(self._first(text, place), text)
            typed = list(pattern.finditer(text))
            if not typed or not np.isin(found.ids, [every[match[0]] for match in typed]).any():
                return found
            borders = [0, *(match.start() + 1 for match in typed), len(text)]  # no name is complete between two
            parts = []
            for start, end in pairwise(borders):
                processor = self._continuing if start else self._first(text, place)
                part = _with_places(processor, text[start:end])
                parts.append(MarkedIds(part.ids, part.starts + start, part.ends + start))
            return MarkedIds(*map(np.concatenate, zip(*parts, strict=True)))

        return segment_encoder(encode)

    def _name_roles(self, directory: TokenizerDirectory) -> dict[str, str]:
        """The tokens that a template can name, as the files beside the model or else the model itself name them."""
        processor = self._processor
        ids = {"bos_token": processor.bos_id(), "unk_token": processor.unk_id(), "pad_token": processor.pad_id()}
        named = {role: self.model.pieces[id].text for role, id in ids.items() if id >= 0}
        end = self.model.pieces[self.end_of_text].text
        return named | directory.names_of_roles() | {"eos_token": end}

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


def _with_places(processor: "SentencePieceProcessor", text: str) -> MarkedIds:
    """The ids of ``text``, and the characters that each comes from."""
    found = parse_spans(processor.encode(text, out_type="serialized_proto"))
    ids, starts, ends = np.array(found, np.int64).reshape(-1, 3).T
    character = np.append(
        np.repeat(np.arange(len(text)), [len(each.encode()) for each in text]), len(text)
    )  # of a byte
    return MarkedIds(ids.astype(np.uint32), character[starts], character[ends])


def _ids(processor: "SentencePieceProcessor", text: str) -> np.ndarray:
    return np.array(processor.encode(text, out_type=int), np.uint32)


def _decode(piece: Piece) -> bytes:
    if piece.kind is PieceKind.BYTE and (match := BYTE.fullmatch(piece.text)):
        return bytes([int(match[1], 16)])
    is_special = piece.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)
    return (piece.text if is_special else piece.text.replace(SPACE, " ")).encode()
