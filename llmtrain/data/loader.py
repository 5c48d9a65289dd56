"""Batches for training and for evaluations, made in advance by a thread."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from llmtrain.data.batch import Batch, Collate, Count, part_of
from llmtrain.data.cache.token_reader import DataError
from llmtrain.data.sequences import Sequences

log = logging.getLogger(__name__)
PREFETCH = 2  # batches ready or in the making
WATCH_SECONDS = 5.0  # between two checks that the thread still runs
PATIENCE_SECONDS = 60.0  # until the log warns that a caller waits for a batch
CLOSE_SECONDS = 10.0  # that closing waits for a blocked thread


class BatchThread(ABC):
    """A thread that makes batches ahead of their use, each on ``device``.  A subclass knows which.

    On a GPU a batch is copied from pinned memory on a separate stream.  The stream that takes the batch waits for the
    copy; the host waits only until the batch is made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: deque[tuple[Batch | None, torch.cuda.Event | None]] = deque()  # None: there are no more
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()  # guards the three above
        self._making = ""  # the work of the thread, for messages
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    @abstractmethod
    def make(self) -> Batch | None:
        """In the thread: make the next batch, on the CPU; None after the last one."""

    def take(self) -> Batch | None:
        """The next batch; None after the last one.

        Raises :class:`llmtrain.data.DataError`, which names the place, if the thread could not make it; the batches
        made before are returned first.
        """
        with self._changed:
            told = time.monotonic() + PATIENCE_SECONDS
            while not self._ready:
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise RuntimeError("the loader is closed")
                if not self._thread.is_alive():
                    raise DataError(f"loader thread, {self._making}: the thread ended without an error")
                self._changed.wait(WATCH_SECONDS)
                if time.monotonic() > told:
                    log.warning("still waiting for the loader thread, %s; is its disk in order?", self._making)
                    told += PATIENCE_SECONDS
            batch, copied = self._ready.popleft()
            self._changed.notify_all()
        if batch is not None and copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for tensor in batch.tensors.values():
                tensor.record_stream(current)  # its memory is the copying stream's, which must not reuse it before
        return batch

    def close(self) -> None:
        """End the thread, after the batch that it is making at most.

        A thread that is blocked in the system (by a network disk that does not answer) is left behind after
        CLOSE_SECONDS; it neither delays the caller nor the end of the process, and ends when it is unblocked.
        """
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("left behind: the loader thread, %s, which is blocked", self._making)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._wait_for_room():
                batch = self.make()
                made = (None, None) if batch is None else self._move(batch)
                with self._changed:
                    if not self._closed:
                        self._ready.append(made)
                    self._changed.notify_all()
                if batch is None:
                    return
        except BaseException as error:
            with self._changed:
                self._error = self._explain(error)
                self._changed.notify_all()

    def _explain(self, error: BaseException) -> BaseException:
        """Add the work of the thread to the error, but not to a lack of device memory, which the caller handles."""
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
            return error
        what = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}".rstrip(": ")
        failed = DataError(f"loader thread, {self._making}: {what}")
        failed.__cause__ = error
        return failed

    def _wait_for_room(self) -> bool:
        """Wait until there is room for a batch; return False if the loader is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < PREFETCH)
            return not self._closed

    def _move(self, batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
        """Start the copy of a batch to the device."""
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):  # also sets the device of this thread
            batch = batch.map(self._copy)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return batch, copied

    def _copy(self, tensor: Tensor) -> Tensor:
        # torch keeps the pinned memory until the end of the copy, and then reuses it
        return tensor.pin_memory().to(self._device, non_blocking=True)


class Loader(BatchThread):
    """The batches of the optimizer steps from ``step`` on.

    A batch follows from ``(seed, position, step, tokens)`` alone: a loader opened with the values that a run had
    when it stopped gives the batches that the run would have had.

    Args:
        sequences: the training data; visited epoch after epoch.
        collate: makes a batch of some sequences, their positions and the seed; pure, so that batches can be repeated.
        seed, shuffle: the order, see :meth:`llmtrain.data.sequences.Sequences.order`.
        batch_size: sequences of a step, from the step's number and the tokens trained on before it.
        part: this rank's number among those that share a step's sequences, and how many they are.  It reads and
            collates its own sequences alone where ``count`` finds the counts of the step without the others'.
        count: the counts of a batch from the outline of its sequences; see :meth:`llmtrain.objective.Objective.count`.
        position: the number of sequences visited before.
        step: the number of the first batch's step.
        tokens: the number of tokens trained on before.
    """

    def __init__(
        self,
        sequences: Sequences,
        collate: Collate,
        *,
        seed: int,
        shuffle: bool,
        batch_size: Callable[[int, int], int],
        device: torch.device,
        part: tuple[int, int] = (0, 1),
        count: Count = lambda outline: None,
        position: int,
        step: int,
        tokens: int,
    ) -> None:
        self._sequences, self._collate = sequences, collate
        self._part, self._count = part, count
        self._seed, self._shuffle = seed, shuffle
        self._batch_size = batch_size
        self._position, self._step, self._tokens = position, step, tokens
        super().__init__(device)

    def next(self) -> Batch:
        """The batch of the next step; raises as :meth:`take`."""
        batch = self.take()
        assert batch is not None
        return batch

    def make(self) -> Batch:
        self._making = f"step {self._step:,}, from sequence {self._position:,} of the order on"
        size = self._batch_size(self._step, self._tokens)
        self._making = (
            f"step {self._step:,}, sequences {self._position:,} to {self._position + size - 1:,} of the order"
        )
        positions = np.arange(self._position, self._position + size)
        batch = self._collate_part(self._sequences.order(positions, self._seed, self._shuffle), positions)
        self._position += size
        self._step += 1
        self._tokens += batch.tokens
        return batch

    def _collate_part(self, numbers: np.ndarray, positions: np.ndarray) -> Batch:
        """This rank's part of the step's batch, which keeps the counts of the whole step."""
        rank, of = self._part
        outline = self._sequences.outline(numbers) if of > 1 else None
        counts = None if outline is None else self._count(outline)
        if outline is None or counts is None:
            rows = self._sequences.gather(numbers)
            batch = replace(self._collate(rows, positions, self._seed), spans=rows.spans)
            return batch if of == 1 else batch.shard(rank, of)
        begin, end = part_of(len(numbers), rank, of)
        own = slice(begin, end) if begin < end else slice(0, 1)
        batch = self._collate(self._sequences.gather(numbers[own]), positions[own], self._seed)
        return replace(
            batch, counts=counts, tokens=outline.tokens, spans=outline.spans, step_sequences=len(numbers),
            is_filler=begin == end,
        )  # fmt: skip


class EvaluationLoader(BatchThread):
    """The sequences ``numbers``, in their order and ``batch_size`` at a time; the last batch may be smaller.

    The position of a sequence is its number.
    """

    def __init__(
        self,
        sequences: Sequences,
        numbers: np.ndarray,
        collate: Collate,
        *,
        seed: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._sequences, self._collate, self._seed = sequences, collate, seed
        self._parts = iter([numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)])
        self._made = 0
        super().__init__(device)

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.take()) is not None:
            yield batch

    def make(self) -> Batch | None:
        if (part := next(self._parts, None)) is None:
            return None
        self._made += 1
        self._making = f"evaluation, batch {self._made:,}"
        return self._collate(self._sequences.gather(part), part, self._seed)


@dataclass(frozen=True)
class TrainingStream:
    """The training sequences in their order, and loaders from any position on."""

    sequences: Sequences
    collate: Collate
    seed: int
    shuffle: bool
    batch_size_at: Callable[[int, int], int]  # (step, tokens trained on before it) -> sequences
    device: torch.device
    part: tuple[int, int] = (0, 1)  # see Loader
    count: Count = lambda outline: None  # see Loader

    def open(self, *, position: int, step: int, tokens: int) -> Loader:
        """The batches from ``step`` on."""
        return Loader(
            self.sequences, self.collate, seed=self.seed, shuffle=self.shuffle, batch_size=self.batch_size_at,
            device=self.device, part=self.part, count=self.count, position=position, step=step, tokens=tokens,
        )  # fmt: skip

    def sequences_at(self, position: int, count: int) -> np.ndarray:
        """Numbers of the sequences at ``count`` positions from ``position`` on."""
        return self.sequences.order(np.arange(position, position + count), self.seed, self.shuffle)
