"""A stream of tokens in memory-mapped shards, cut into sequences."""

from collections.abc import Sequence

import numpy as np


class Sequences:
    """Sequences of ``sequence_length`` tokens over ``shards``, one logical stream of token ids.

    Sequence ``i`` has the inputs ``[i * L, i * L + L)`` and, one further, the targets: every token but the first is
    a target once, and only the last ``unused_tokens`` are not used.  Sequences run across the edges of shards.

    A row is a sequence with its last target, ``L + 1`` tokens.  The stream is held as segments of rows: for each
    shard a strided view of the rows that lie in it, and between them copies of the few that cross an edge.
    """

    def __init__(self, shards: Sequence[np.ndarray], sequence_length: int) -> None:
        assert sequence_length > 0
        self.sequence_length = sequence_length
        self.tokens = sum(map(len, shards))
        self._dtype = np.result_type(*shards) if shards else np.dtype(np.int64)
        self._length = max(self.tokens - 1, 0) // sequence_length
        self.unused_tokens = self.tokens - self._length * sequence_length - (self._length > 0)
        self._segments: list[np.ndarray] = []  # each (rows, sequence_length + 1)
        self._first_rows: list[int] = []  # of each segment
        self._divide(shards)

    def __len__(self) -> int:
        return self._length

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the sequences ``indices``, both ``(len(indices), sequence_length)`` int64."""
        assert len(indices) == 0 or 0 <= indices.min() <= indices.max() < self._length
        segment = np.searchsorted(self._first_rows, indices, side="right") - 1
        touched = np.unique(segment)
        if len(touched) == 1:
            rows = self._take(touched[0], indices)
        else:
            rows = np.empty((len(indices), self.sequence_length + 1), self._dtype)
            for each in touched:
                rows[segment == each] = self._take(each, indices[segment == each])
        return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)

    def _take(self, segment: int, indices: np.ndarray) -> np.ndarray:
        return self._segments[segment][indices - self._first_rows[segment]]

    def _divide(self, shards: Sequence[np.ndarray]) -> None:
        length = self.sequence_length
        row = 0  # the first that no segment has yet
        begin = 0  # of the shard, in the stream
        for shard in shards:
            end = begin + len(shard)
            first, stop = -(-begin // length), (end - 1) // length  # the rows that lie wholly in this shard
            if first < stop:
                self._add_crossing(shards, row, first)
                windows = np.lib.stride_tricks.sliding_window_view(shard[first * length - begin :], length + 1)
                self._add(first, windows[::length])
                row = stop
            begin = end
        self._add_crossing(shards, row, self._length)

    def _add(self, first_row: int, rows: np.ndarray) -> None:
        self._first_rows.append(first_row)
        self._segments.append(rows)

    def _add_crossing(self, shards: Sequence[np.ndarray], row: int, stop: int) -> None:
        if row < stop:
            length = self.sequence_length
            tokens = np.concatenate(slice_stream(shards, row * length, stop * length + 1))
            self._add(row, np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length])


def slice_stream(shards: Sequence[np.ndarray], begin: int, end: int) -> list[np.ndarray]:
    """Tokens ``[begin, end)`` of the stream that ``shards`` make, as views of them."""
    views = []
    for shard in shards:
        if begin < len(shard) and end > 0:
            views.append(shard[max(begin, 0) : max(end, 0)])
        begin, end = begin - len(shard), end - len(shard)
    return views
