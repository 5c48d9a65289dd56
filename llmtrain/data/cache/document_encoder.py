"""Encode documents as token ids: in parallel, in order, in bounded memory."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from math import floor
from typing import NamedTuple

import numpy as np

from llmtrain.data.cache.parallel_map import map_in_order
from llmtrain.data.cache.token_reader import DataError
from llmtrain.data.sources.documents import PIECE, DocumentPiece
from llmtrain.tokenizer import CUTS, Tokenizer

LONGEST_WHOLE = 4 * PIECE  # characters encoded at once of a document that cannot be cut without changing ids
LARGE = 2 * PIECE  # characters from which on only one thread encodes: a library may need 100 bytes for each


class EncodedText(NamedTuple):
    """Consecutive documents of one split, training or validation, or a stretch of one document."""

    is_validation: bool
    ids: np.ndarray  # as wide as the tokenizer's ids need; each document between prefix and end-of-text token
    documents: int  # documents that end in here
    ends: tuple[tuple[int, str], ...] = ()  # for each of them, the place after its last id, and its source


def dtype_of(vocab_size: int) -> np.dtype:
    """The type that token ids are stored in, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_validation(document: int, fraction: float) -> bool:
    """True for the documents that validate: ``fraction`` of them, evenly spread, never the first."""
    return floor((document + 1) * fraction) > floor(document * fraction)


def encode_documents(
    pieces: Iterable[DocumentPiece], tokenizer: Tokenizer, validation_fraction: float, *, num_threads: int | None = None
) -> Iterator[EncodedText]:
    """Encode documents on threads (native tokenizers release Python's lock).

    Results keep the order of the documents within each split, for any number of threads (None: one per core).  At most
    two jobs per thread are in memory, each of about ``PIECE`` characters (``LONGEST_WHOLE`` where documents cannot be
    cut).  Raises :class:`DataError`, naming the document, if one cannot be encoded, and ValueError if one has a token
    for which the model has no row.
    """
    dtype = dtype_of(tokenizer.vocab_size)
    prefix = np.array(tokenizer.prefix, dtype)
    end_of_text = np.array([tokenizer.end_of_text], dtype)
    one_at_a_time = threading.Lock()

    def encode(job: "_Job") -> EncodedText:
        arrays: list[np.ndarray] = []
        ends: list[tuple[int, str]] = []
        length = 0
        at = job.pieces[0]
        try:
            for at in job.pieces:
                _, piece = at
                with one_at_a_time if len(piece.text) > LARGE else contextlib.nullcontext():
                    ids = (tokenizer.encode if piece.starts_document else tokenizer.encode_continuation)(piece.text)
                tokenizer.check_ids(ids)
                if piece.starts_document and len(prefix):
                    arrays.append(prefix)
                    length += len(prefix)
                arrays.append(ids.astype(dtype))
                length += len(ids)
                if piece.ends_document:
                    arrays.append(end_of_text)
                    length += 1
                    ends.append((length, piece.source))
            return EncodedText(job.is_validation, np.concatenate(arrays), len(ends), tuple(ends))
        except BaseException as error:  # a native tokenizer may raise something other than an Exception
            # a ValueError says what would work, as for a token without a row; the tokenizer's own failures do not
            is_mistake = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
            what = str(error) if is_mistake else f"{type(error).__name__}: {error}".rstrip(": ")
            document, piece = at
            origin = f" ({piece.origin})" if piece.origin else ""
            kind = ValueError if is_mistake else DataError
            raise kind(f"document {document:,}{origin} cannot be encoded: {what}") from error

    yield from map_in_order(encode, _make_jobs(_rejoin(pieces, tokenizer), validation_fraction), num_threads)


class _Stretch(NamedTuple):
    """A piece of a document, or several joined."""

    text: str
    starts_document: bool
    ends_document: bool
    origin: str
    source: str


def _rejoin(pieces: Iterable[DocumentPiece], tokenizer: Tokenizer) -> Iterator[_Stretch]:
    """Join pieces whose cut would change the ids, up to ``LONGEST_WHOLE`` characters."""
    held: _Stretch | None = None
    for piece in pieces:
        if held and not (len(held.text) >= LONGEST_WHOLE or _may_cut(held.text, piece.text, tokenizer)):
            held = held._replace(text=held.text + piece.text, ends_document=piece.ends_document)
        else:
            starts = held is None
            if held:
                yield held
            held = _Stretch(piece.text, starts, piece.ends_document, piece.origin, piece.source or piece.origin)
        if held.ends_document:
            yield held
            held = None
    if held:
        yield held


def _may_cut(left: str, right: str, tokenizer: Tokenizer) -> bool:
    return tokenizer.cuts is CUTS or any(cut.match(left[-1:] + right[:1]) for cut in tokenizer.cuts)


class _Job(NamedTuple):
    is_validation: bool
    pieces: list[tuple[int, _Stretch]]  # each with the number of its document, from 1


def _make_jobs(pieces: Iterable[_Stretch], validation_fraction: float) -> Iterator[_Job]:
    """Collect pieces of the same split to about ``PIECE`` characters: a job for one small document is all overhead."""
    collected: dict[bool, list[tuple[int, _Stretch]]] = {False: [], True: []}
    sizes = {False: 0, True: 0}
    document = 0
    for piece in pieces:
        validates = is_validation(document, validation_fraction)
        collected[validates].append((document + 1, piece))
        document += piece.ends_document
        sizes[validates] += len(piece.text)
        if sizes[validates] >= PIECE:
            yield _Job(validates, collected[validates])
            collected[validates], sizes[validates] = [], 0
    for validates, rest in collected.items():
        if rest:
            yield _Job(validates, rest)
