"""A SentencePiece model file, read without the protobuf package (sentencepiece_model.proto of the library)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Self


class PieceKind(IntEnum):
    """``SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    """``TrainerSpec.ModelType``."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class Piece(NamedTuple):
    """A row of the vocabulary."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of the file that decide how a text is split."""

    pieces: list[Piece]  # by id
    algorithm: Algorithm
    has_bytes: bool  # characters without a piece are encoded as bytes
    space_is_suffix: bool  # ``▁`` ends a word instead of beginning it
    rules: str  # name of the rules that rewrite characters
    charsmap: bytes  # those rules, compiled; empty: none
    adds_space: bool  # puts a space before a text
    trims_spaces: bool  # removes spaces at both ends, and repeated ones within
    escapes_spaces: bool  # writes spaces as ``▁``

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse the content of a file.  Raises ValueError for anything else."""
        try:
            pieces = [_parse_piece(value) for number, value in _fields(data) if number == 1]
            parts: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}}
            for number, value in _fields(data):
                if number in parts:
                    parts[number].update(_fields(value))
            trainer, normalizer = parts[2], parts[3]
            return cls(
                pieces=pieces,
                algorithm=Algorithm(int(trainer.get(3, Algorithm.UNIGRAM))),
                has_bytes=bool(trainer.get(35, 0)),
                space_is_suffix=bool(trainer.get(24, 0)),
                rules=bytes(normalizer.get(1, b"")).decode(),
                charsmap=bytes(normalizer.get(2, b"")),
                adds_space=bool(normalizer.get(3, 1)),
                trims_spaces=bool(normalizer.get(4, 1)),
                escapes_spaces=bool(normalizer.get(5, 1)),
            )
        except (IndexError, TypeError, struct.error) as error:
            raise ValueError(f"cut or damaged: {error}") from error


def parse_spans(data: bytes) -> list[tuple[int, int, int]]:
    """Id, start and end (bytes of the text) of each piece in a ``SentencePieceText``, the result of an encoding."""
    found = []
    for number, piece in _fields(data):
        if number == 2:
            values = {key: int(value) for key, value in _fields(piece) if isinstance(value, int)}
            found.append((values.get(2, 0), values.get(4, 0), values.get(5, 0)))
    return found


def _parse_piece(data: int | bytes) -> Piece:
    text, score, kind = b"", 0.0, int(PieceKind.NORMAL)
    for number, value in _fields(data):
        match number:
            case 1:
                text = bytes(value)
            case 2:
                (score,) = struct.unpack("<f", bytes(value))
            case 3:
                kind = int(value)
    return Piece(text.decode(), score, PieceKind(kind))


def _fields(data: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value (an integer or bytes) of each field of a message."""
    assert isinstance(data, bytes)
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        match key & 7:
            case 0:
                value, position = _varint(data, position)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, position = _varint(data, position)
            case 5:
                size = 4
            case kind:
                raise ValueError(f"a field of kind {kind}")
        if position + size > len(data):
            raise IndexError("it ends within a field")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
