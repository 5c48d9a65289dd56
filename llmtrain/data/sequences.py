"""Sequences by number: the contract, and the sequences of a stream of tokens."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llmtrain.data.cache.token_reader import TokenSlice
from llmtrain.data.order.permutation import order

Shard = np.ndarray | TokenSlice


class InMemoryShard:
    """Token ids in memory, read in the way of a :class:`TokenSlice`."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, begin: int, out: np.ndarray) -> None:
        out[:] = self._ids[begin : begin + len(out)]

    def check(self) -> None:
        """Do nothing: memory needs no check."""


class Rows(NamedTuple):
    """Some sequences, padded on the right to the same length; an input of padding is 0, its target IGNORE."""

    inputs: np.ndarray  # (rows, sequence) int64
    targets: np.ndarray  # (rows, sequence) int64; IGNORE: no target
    segments: np.ndarray | None = None  # (rows, sequence) int32: the example of each token, from 1 on; 0: padding
    lengths: np.ndarray | None = None  # (rows,) int64: tokens before the padding; None: nothing is padded

    @property
    def tokens(self) -> int:
        """Inputs that are not padding."""
        return self.inputs.size if self.lengths is None else int(self.lengths.sum())

    @property
    def spans(self) -> tuple[int, ...]:
        """The lengths of the stretches of tokens that attend to one another: of the examples, or of the rows."""
        if self.segments is not None:
            rows = np.arange(len(self.segments))[:, None] * (int(self.segments.max(initial=0)) + 1)
            counts = np.bincount((rows + self.segments)[self.segments > 0])
            return tuple(counts[counts > 0].tolist())
        if self.lengths is not None:
            return tuple(self.lengths.tolist())
        return (self.inputs.shape[1],) * len(self.inputs)

    def lengths_of(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """``lengths`` for each of the tensors ``names`` of a batch that are padded as the rows are."""
        if self.lengths is None:
            return {}
        lengths = tuple(self.lengths.tolist())
        return dict.fromkeys(names, lengths)


class Outline(NamedTuple):
    """The numbers of some sequences that a step divides by, known without the tensors of a batch."""

    tokens: int  # as :attr:`Rows.tokens`
    spans: tuple[int, ...]  # as :attr:`Rows.spans`
    targets: int  # tokens that have one
    classes: np.ndarray | None = None  # (targets,) int64, in the order of the rows, in data with labels


class Sequences(ABC):
    """Sequences ``0 … len - 1``, each of at most ``sequence_length`` tokens."""

    sequence_length: int
    tokens: int  # of all

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def gather(self, indices: np.ndarray) -> Rows:
        """The sequences ``indices``.

        Raises :class:`llmtrain.data.DataError`, naming the file, if it was truncated or written to, or its disk fails.
        """

    def outline(self, indices: np.ndarray) -> Outline | None:
        """The numbers of the sequences ``indices``; None: only :meth:`gather` finds them.  Raises as :meth:`gather`."""
        return None

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence on average, without padding."""
        return self.sequence_length

    @property
    def attended_length(self) -> int:
        """Tokens that attend to one another, averaged over the tokens: of what attention costs."""
        return self.sequence_length

    def tokens_before(self, position: int, seed: int, shuffle: bool) -> int:
        """Tokens, without padding, of the sequences at the first ``position`` positions of :meth:`order`."""
        return round(position * self.mean_length)

    def position_of(self, tokens: int, seed: int, shuffle: bool) -> int:
        """The least position before which there are ``tokens`` tokens: the inverse of :meth:`tokens_before`."""
        return math.ceil(tokens / self.mean_length)

    def order(self, positions: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """The number of the sequence at each of ``positions``, counted over all epochs; int64.

        A pure function of its arguments, and each epoch visits every sequence once.
        """
        return order(positions, len(self), seed, shuffle)

    def digest(self) -> str:
        """Eight hexadecimal digits that other sequences would not have: of their number, and of up to 64 of them."""
        numbers = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64)) if len(self) else np.empty(0, np.int64)
        rows = self.gather(numbers)
        return _digest([len(self), self.tokens, rows.spans], rows.inputs, rows.targets)

    def alike(self, indices: np.ndarray) -> np.ndarray:
        """``indices`` ordered by the length of the sequences, for an evaluation of all of them."""
        return indices


class Stream(Sequences):
    """Sequences of ``sequence_length`` tokens over ``shards``, one logical stream of token ids.

    Sequence ``i`` has the inputs ``[i * L, i * L + L)``, and the targets are one token further: every token but the
    first is a target once, and only those at the end that make no sequence are not used.  Sequences run across the
    edges of shards.
    """

    def __init__(self, shards: Sequence[Shard], sequence_length: int) -> None:
        assert sequence_length > 0
        self.sequence_length = sequence_length
        self.tokens = sum(map(len, shards))
        self._shards = [shard if isinstance(shard, TokenSlice) else InMemoryShard(shard) for shard in shards]
        self._begins = np.cumsum([0, *map(len, shards)])[:-1]  # of the shards in the stream
        self._dtype = np.result_type(*(shard.dtype for shard in shards)) if shards else np.dtype(np.int64)
        self._length = max(self.tokens - 1, 0) // sequence_length

    def __len__(self) -> int:
        return self._length

    def digest(self) -> str:
        """That of up to 64 parts of the stream, whatever the length of its sequences."""
        length = min(self.tokens, 256)
        parts = np.empty((min(64, self.tokens), length), self._dtype)
        for part, begin in zip(parts, np.linspace(0, self.tokens - length, len(parts)).astype(int), strict=True):
            shard = int(np.searchsorted(self._begins, begin, side="right")) - 1
            for _ in self._read_across(shard, int(begin - self._begins[shard]), part):
                pass
        return _digest([self.tokens], parts.astype(np.int64))

    def gather(self, indices: np.ndarray) -> Rows:
        assert len(indices) == 0 or 0 <= indices.min() <= indices.max() < self._length
        rows = np.empty((len(indices), self.sequence_length + 1), self._dtype)  # inputs, and one target more
        begins = indices * self.sequence_length
        first = np.searchsorted(self._begins, begins, side="right") - 1  # the shard that a row begins in
        touched: set[int] = set()
        for row, shard, begin in zip(rows, first.tolist(), (begins - self._begins[first]).tolist(), strict=True):
            touched.add(shard)
            if begin + len(row) <= len(self._shards[shard]):
                self._shards[shard].read(begin, row)
            else:
                touched.update(self._read_across(shard, begin, row))
        for shard in touched:
            self._shards[shard].check()  # after reading: later changes of the file are not in the rows
        return Rows(rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64))

    def outline(self, indices: np.ndarray) -> Outline:
        tokens = len(indices) * self.sequence_length
        return Outline(tokens, (self.sequence_length,) * len(indices), tokens)

    def _read_across(self, shard: int, begin: int, row: np.ndarray) -> Iterator[int]:
        """Fill ``row`` from ``begin`` of ``shard`` on and from the shards after it; yield their numbers."""
        while len(row):
            here = row[: len(self._shards[shard]) - begin]
            self._shards[shard].read(begin, here)
            yield shard
            row, shard, begin = row[len(here) :], shard + 1, 0


def _digest(facts: list[object], *arrays: np.ndarray) -> str:
    content = [repr(facts).encode(), *(np.ascontiguousarray(array, "<i8").tobytes() for array in arrays)]
    return hashlib.sha256(b"".join(content)).hexdigest()[:8]


def slice_stream(shards: Sequence[Shard], begin: int, end: int) -> list[Shard]:
    """Tokens ``[begin, end)`` of the stream that ``shards`` make, as views of them."""
    views = []
    for shard in shards:
        if begin < len(shard) and end > 0:
            views.append(shard[max(begin, 0) : max(end, 0)])
        begin, end = begin - len(shard), end - len(shard)
    return views
