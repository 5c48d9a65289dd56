"""Documents to token ids, in parallel, in order, in bounded memory."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import floor
from typing import NamedTuple

import numpy as np

from llmtrain.data.documents import PIECE, Piece
from llmtrain.data.reader import DataFailed
from llmtrain.tokenizer import Tokenizer

MAX_THREADS = 32  # one thread reads for all of them, and each holds a few MB


class Encoded(NamedTuple):
    """Some consecutive documents of one part of the data, or a stretch of one document."""

    is_validation: bool
    ids: np.ndarray  # as wide as the tokenizer's ids need; every document ends with its end-of-text token
    documents: int  # how many documents end in here


def dtype_of(vocab_size: int) -> np.dtype:
    """The type that token ids are stored in, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_validation(document: int, fraction: float) -> bool:
    """Whether the document of this number is set aside: ``fraction`` of them, evenly spread, never the first."""
    return floor((document + 1) * fraction) > floor(document * fraction)


def encode_documents(
    pieces: Iterable[Piece], tokenizer: Tokenizer, validation_fraction: float, *, num_threads: int | None = None
) -> Iterator[Encoded]:
    """Encode documents on threads (tokenizers of native code let go of Python's lock).

    Results keep the order of the documents within each part, whatever the number of threads (None: one a core).
    At most two jobs a thread of about ``PIECE`` characters are in memory.  Raises :class:`DataFailed`, naming the
    document, if one cannot be encoded.
    """
    num_threads = num_threads or min(getattr(os, "process_cpu_count", os.cpu_count)() or 1, MAX_THREADS)
    dtype = dtype_of(tokenizer.vocab_size)
    end_of_text = np.array([tokenizer.end_of_text], dtype)

    def encode(job: "_Job") -> Encoded:
        arrays = []
        at = job.pieces[0]
        try:
            for at in job.pieces:
                _, piece = at
                ids = tokenizer.encode(piece.text)
                if (largest := ids.max(initial=0)) >= tokenizer.vocab_size:
                    raise DataFailed(f"id {largest} is beyond the tokenizer's vocabulary of {tokenizer.vocab_size:,}")
                arrays.append(ids.astype(dtype))
                if piece.ends_document:
                    arrays.append(end_of_text)
            ended = sum(piece.ends_document for _, piece in job.pieces)
            return Encoded(job.is_validation, np.concatenate(arrays), ended)
        except BaseException as error:  # what a tokenizer of native code raises may be no Exception
            what = str(error) if isinstance(error, DataFailed) else f"{type(error).__name__}: {error}".rstrip(": ")
            document, piece = at
            origin = f" ({piece.origin})" if piece.origin else ""
            raise DataFailed(f"document {document:,}{origin} cannot be encoded: {what}") from error

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")
    waiting: deque[Future[Encoded]] = deque()
    try:
        for job in _make_jobs(pieces, validation_fraction):
            waiting.append(pool.submit(encode, job))
            if len(waiting) >= 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Job(NamedTuple):
    is_validation: bool
    pieces: list[tuple[int, Piece]]  # each with the number of its document, from 1


def _make_jobs(pieces: Iterable[Piece], validation_fraction: float) -> Iterator[_Job]:
    """Collect pieces of the same part to about ``PIECE`` characters: a job for a small document is all overhead."""
    collected: dict[bool, list[tuple[int, Piece]]] = {False: [], True: []}
    sizes = {False: 0, True: 0}
    document = 0
    for piece in pieces:
        part = is_validation(document, validation_fraction)
        collected[part].append((document + 1, piece))
        document += piece.ends_document
        sizes[part] += len(piece.text)
        if sizes[part] >= PIECE:
            yield _Job(part, collected[part])
            collected[part], sizes[part] = [], 0
    for part, rest in collected.items():
        if rest:
            yield _Job(part, rest)
