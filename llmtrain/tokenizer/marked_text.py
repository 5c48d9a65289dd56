"""Text with tokens that stand for no text in it, such as the ends of turns, as ids with the places they come from."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from llmtrain.tokenizer import Tokenizer

Piece = str | int  # text, or the id of a token that stands for no text


class MarkedIds(NamedTuple):
    """Ids, and the stretch of the pieces that each comes from.

    Places count the characters of the text; an id among the pieces takes one place.  The bytes of one character have
    its place each; a token that stands for no character, such as the space put before a text, has an empty stretch.
    """

    ids: np.ndarray  # (tokens,) uint32
    starts: np.ndarray  # (tokens,) int64
    ends: np.ndarray  # (tokens,) int64


MarkedEncoder = Callable[[Sequence[Piece]], MarkedIds]
TextEncoder = Callable[[str, int], MarkedIds]  # the ids of a stretch of text that begins at a place


def segment_encoder(encode: TextEncoder, begin: Sequence[int] = ()) -> MarkedEncoder:
    """An encoder that gives each stretch of text between tokens to ``encode``; one after ``begin`` begins at 0."""

    def encode_pieces(pieces: Sequence[Piece]) -> MarkedIds:
        found, place = [], 0
        pieces = joined(pieces)
        for number, piece in enumerate(pieces):
            if isinstance(piece, int):
                at = np.array([place], np.int64)
                found.append(MarkedIds(np.array([piece], np.uint32), at, at + 1))
                place += 1
            else:
                ids, starts, ends = encode(piece, 0 if pieces[:number] == list(begin) else place)
                found.append(MarkedIds(ids, starts + place, ends + place))
                place += len(piece)
        return MarkedIds(*map(np.concatenate, zip(*found, strict=True))) if found else EMPTY

    return encode_pieces


EMPTY = MarkedIds(np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.int64))


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """``pieces`` with neighbouring texts as one, and none empty."""
    found: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        elif piece != "":
            found.append(piece)
    return found


def plain_text_encoder(tokenizer: "Tokenizer", marks: Mapping[str, int]) -> TextEncoder:
    """The encoder of text of a tokenizer whose ids have the bytes of the text; no name of ``marks`` becomes its id."""
    names = sorted((name for name in marks if len(name) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def ids_of(text: str, *, begins: bool) -> np.ndarray:
        ids = (tokenizer.encode if begins else tokenizer.encode_continuation)(text)
        found = [] if pattern is None else list(pattern.finditer(text))
        if not found or not np.isin(ids, [marks[match[0]] for match in found]).any():
            return ids
        borders = [0, *(match.start() + 1 for match in found), len(text)]  # no name is complete between two of them
        stretches = [text[start:end] for start, end in pairwise(borders) if start < end]
        return np.concatenate([ids_of(each, begins=begins and i == 0) for i, each in enumerate(stretches)])

    def encode(text: str, place: int) -> MarkedIds:
        ids = ids_of(text, begins=place == 0)
        return MarkedIds(ids, *spans_of_bytes(tokenizer, text, ids))

    return encode


def spans_of_bytes(tokenizer: "Tokenizer", text: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends in ``text`` of the characters of each id; a space put before it counts as nothing.

    Raises ValueError if the ids are not its bytes.
    """
    parts = [tokenizer.decode_bytes([id]) for id in ids.tolist()]
    sizes = np.array(list(map(len, parts)), np.int64)
    characters = np.array([len(character.encode(errors="replace")) for character in text], np.int64)
    if parts and parts[0].startswith(b" ") and sizes.sum() == characters.sum() + 1:
        sizes[0] -= 1
    if sizes.sum() != characters.sum():
        raise ValueError(
            "data.split_at_responses=false: the tokenizer does not keep the bytes of a text, so it cannot be told "
            "which tokens belong to a response; take true"
        )
    place = np.repeat(np.arange(len(text)), characters)  # of each byte
    ends = np.cumsum(sizes)
    starts = ends - sizes
    inner = np.append(place, len(text))
    return inner[starts], np.where(sizes > 0, inner[np.maximum(ends - 1, 0)] + 1, inner[starts])
