"""Examples of different lengths, each with its own targets, as sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain.data.batch import IGNORE, padded
from llmtrain.data.cache.token_reader import TokenSlice
from llmtrain.data.order.packing import pack
from llmtrain.data.order.permutation import mix, order
from llmtrain.data.sequences import Outline, Rows, Sequences

BUCKET = 1024  # positions of an epoch whose examples are sorted by length
GROUP = 32  # examples of similar length that are visited one after the other


@dataclass(frozen=True)
class ExampleStore:
    """Examples in files.

    ``shards`` hold one stream of ids: for each example its inputs and, with ``has_targets``, as many targets after
    them.  Without ``has_targets`` an example has one target, in ``labels``, at its last input.
    """

    shards: Sequence[TokenSlice]
    lengths: np.ndarray  # (examples,) int64: inputs of each
    labels: np.ndarray  # (examples,) int64; all 0 where there are targets
    has_targets: bool

    def __len__(self) -> int:
        return len(self.lengths)


class Examples(Sequences):
    """Examples, each a sequence, or several in a row of ``sequence_length`` tokens with ``is_packed``.

    Memory grows with the number of examples, not with that of their tokens.
    """

    def __init__(self, stored: ExampleStore, sequence_length: int, *, is_packed: bool = False) -> None:
        assert stored.lengths.max(initial=1) <= sequence_length
        assert stored.lengths.min(initial=1) > 0
        self.sequence_length = sequence_length
        self.tokens = int(stored.lengths.sum())
        self.is_packed = is_packed
        self.stored = stored
        per_input = 2 if stored.has_targets else 1
        self._begins = np.cumsum(stored.lengths) * per_input - stored.lengths * per_input  # in the stream
        self._shard_begins = np.cumsum([0, *map(len, stored.shards)])[:-1]
        if is_packed:
            self._members, self._row_begins = pack(stored.lengths, sequence_length)
            self.lengths = np.add.reduceat(stored.lengths[self._members], self._row_begins[:-1])
        else:
            self.lengths = stored.lengths
        self._counted: tuple[tuple[int, int, bool], np.ndarray] | None = None  # of :meth:`_tokens_of_epoch`
        self._targets: np.ndarray | None = None  # (examples,) counted so far, -1: not yet

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mean_length(self) -> float:
        return self.tokens / max(len(self), 1)

    def gather(self, indices: np.ndarray) -> Rows:
        assert len(indices) == 0 or 0 <= indices.min() <= indices.max() < len(self)
        lengths = self.lengths[indices]
        shape = len(indices), padded(int(lengths.max(initial=1)), self.sequence_length)
        inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        segments = np.zeros(shape, np.int32) if self.is_packed else None
        touched: set[int] = set()
        for row, index in enumerate(indices.tolist()):
            at = 0
            for segment, example in enumerate(self._examples_of(index), 1):
                end = at + int(self.stored.lengths[example])
                self._fill(example, inputs[row, at:end], targets[row, at:end], touched)
                if segments is not None:
                    segments[row, at:end] = segment
                at = end
        for shard in touched:
            self.stored.shards[shard].check()  # after reading: later changes of the file are not in the rows
        return Rows(inputs, targets, segments, lengths)

    @property
    def attended_length(self) -> int:
        lengths = self.stored.lengths.astype(np.float64)  # of examples: those that share a row do not see one another
        return round(float((lengths**2).sum() / max(self.tokens, 1)))

    def tokens_before(self, position: int, seed: int, shuffle: bool) -> int:
        epoch, offset = divmod(position, len(self))
        return epoch * self.tokens + int(self._tokens_of_epoch(epoch, seed, shuffle)[offset] if offset else 0)

    def position_of(self, tokens: int, seed: int, shuffle: bool) -> int:
        epoch, left = divmod(tokens, self.tokens)
        if not left:
            return epoch * len(self)
        return epoch * len(self) + int(np.searchsorted(self._tokens_of_epoch(epoch, seed, shuffle), left))

    def _tokens_of_epoch(self, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
        """Tokens before each offset of an epoch, and in all of it, ``(sequences + 1,)``; kept for the next call."""
        if self._counted is None or self._counted[0] != (epoch, seed, shuffle):
            n = len(self)
            sums = np.zeros(n + 1, np.int64)
            for begin in range(0, n, 64 * BUCKET):  # some at a time, to limit memory
                positions = epoch * n + np.arange(begin, min(begin + 64 * BUCKET, n))
                sums[begin + 1 : begin + 1 + len(positions)] = self.lengths[self.order(positions, seed, shuffle)]
            self._counted = (epoch, seed, shuffle), sums.cumsum()
        return self._counted[1]

    def order(self, positions: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """The order of :meth:`Sequences.order`, with examples of similar length one after the other.

        The epoch's permutation is cut into buckets of ``BUCKET`` positions.  The examples of a bucket are sorted by
        length into groups of ``GROUP``, which are visited in random order; an incomplete group, of the longest
        examples, comes last.
        """
        n = len(self)
        if not shuffle or self.is_packed:  # packed rows are of similar length anyway
            return order(positions, n, seed, shuffle)
        epochs, offsets = np.divmod(positions.astype(np.int64), n)
        buckets, places = np.divmod(offsets, BUCKET)
        per_epoch = -(-n // BUCKET)
        wanted, which = np.unique(epochs * per_epoch + buckets, return_inverse=True)
        visited = np.empty(len(positions), np.int64)
        for begin in range(0, len(wanted), 64):  # some at a time, to limit memory
            sorted_buckets = self._sort_buckets(wanted[begin : begin + 64], per_epoch, seed)
            here = (which >= begin) & (which < begin + 64)
            visited[here] = sorted_buckets[which[here] - begin, places[here]]
        return visited

    def alike(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(self.lengths[indices], kind="stable")]

    def _sort_buckets(self, buckets: np.ndarray, per_epoch: int, seed: int) -> np.ndarray:
        """The examples of ``buckets``, counted over all epochs, in the order of their visits: ``(buckets, BUCKET)``.

        The last bucket of an epoch may be shorter; the end of its row is undefined.
        """
        n = len(self)
        epochs, numbers = np.divmod(buckets, per_epoch)
        offsets = numbers[:, None] * BUCKET + np.arange(BUCKET)
        is_valid = offsets < n
        indices = order((epochs[:, None] * n + np.minimum(offsets, n - 1)).ravel(), n, seed, shuffle=True)
        indices = indices.reshape(offsets.shape)
        lengths = np.where(is_valid, self.lengths[indices], np.iinfo(np.int64).max)  # beyond the epoch: last
        by_length = np.take_along_axis(indices, np.argsort(lengths, axis=1, kind="stable"), axis=1)
        groups = np.arange(BUCKET // GROUP)
        salt = mix(np.array([seed % 2**64], np.uint64)) + np.uint64(1)  # another salt than the permutation's
        keys = mix(mix(buckets.astype(np.uint64) + salt)[:, None] + groups.astype(np.uint64))
        is_complete = (groups + 1) * GROUP <= is_valid.sum(axis=1)[:, None]
        visits = np.lexsort((keys, ~is_complete), axis=1)
        visits = np.where(np.take_along_axis(is_complete, visits, 1), visits, groups)  # incomplete groups stay last
        return by_length.reshape(len(buckets), -1, GROUP)[np.arange(len(buckets))[:, None], visits].reshape(
            offsets.shape
        )

    def outline(self, indices: np.ndarray) -> Outline:
        examples = np.array([example for index in indices.tolist() for example in self._examples_of(index)], np.int64)
        lengths = self.stored.lengths[examples]
        spans, tokens = tuple(lengths.tolist()), int(lengths.sum())
        if not self.stored.has_targets:
            return Outline(tokens, spans, len(examples), self.stored.labels[examples])
        return Outline(tokens, spans, sum(map(self._count_targets, examples.tolist())))

    def _count_targets(self, example: int) -> int:
        """The number of targets of an example, which is counted once."""
        if self._targets is None:
            self._targets = np.full(len(self.stored), -1, np.int32)
        if self._targets[example] < 0:
            touched: set[int] = set()
            length = int(self.stored.lengths[example])
            targets = np.empty(length, self.stored.shards[0].dtype)
            self._read(int(self._begins[example]) + length, targets, touched)
            for shard in touched:
                self.stored.shards[shard].check()
            self._targets[example] = np.count_nonzero(targets != no_target(targets.dtype))
        return int(self._targets[example])

    def _examples_of(self, index: int) -> list[int]:
        if not self.is_packed:
            return [index]
        return self._members[self._row_begins[index] : self._row_begins[index + 1]].tolist()

    def _fill(self, example: int, inputs: np.ndarray, targets: np.ndarray, touched: set[int]) -> None:
        stored = self.stored
        ids = np.empty(len(inputs) * (2 if stored.has_targets else 1), stored.shards[0].dtype)
        self._read(int(self._begins[example]), ids, touched)
        inputs[:] = ids[: len(inputs)]
        if stored.has_targets:
            targets[:] = ids[len(inputs) :]
            targets[targets == no_target(ids.dtype)] = IGNORE
        else:
            targets[-1] = stored.labels[example]

    def _read(self, begin: int, ids: np.ndarray, touched: set[int]) -> None:
        """Fill ``ids`` from the place ``begin`` of the stream on; add the files to ``touched``."""
        shard = int(np.searchsorted(self._shard_begins, begin, side="right")) - 1
        begin -= int(self._shard_begins[shard])
        while len(ids):  # an example may run over the end of a file
            here = ids[: len(self.stored.shards[shard]) - begin]
            self.stored.shards[shard].read(begin, here)
            touched.add(shard)
            ids, shard, begin = ids[len(here) :], shard + 1, 0

    def padding(self, batch_size: int = 8) -> float:
        """The share of padding in training batches, estimated from the beginning of an epoch."""
        number = min(len(self), BUCKET)
        lengths = self.lengths[self.order(np.arange(number), 0, shuffle=True)]
        batches = [lengths[begin : begin + batch_size] for begin in range(0, number, batch_size)]
        return 1 - lengths.sum() / sum(len(b) * padded(int(b.max()), self.sequence_length) for b in batches)


def no_target(dtype: np.dtype) -> int:
    """The id that stands for IGNORE in stored targets."""
    return int(np.iinfo(dtype).max)
