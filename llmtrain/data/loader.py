"""Training batches, made ahead of need by a thread."""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
import torch

from llmtrain.data import IGNORE, Batch
from llmtrain.data.order import order
from llmtrain.data.sequences import Sequences

PREFETCH = 2  # batches ready or in the making
WATCH_SECONDS = 5.0  # between two looks whether the thread still lives


class Loader:
    """The batches of the optimizer steps from ``step`` on, each on ``device``.

    A batch follows from ``(seed, position, step, tokens)`` alone: a loader opened with the values that a run had
    when it stopped gives the batches that the run would have had.

    Args:
        sequences: what to train on; visited epoch after epoch.
        seed, shuffle: which order, see :func:`llmtrain.data.order.order`.
        batch_size: sequences of a step, from the step's number and the tokens trained on before it.
        position: how many sequences have been visited before.
        step: the number of the first batch's step.
        tokens: how many targets have been trained on before.

    On a GPU a batch goes through pinned memory on a stream of its own.  The stream that asks for the batch waits for
    the copy; the host waits for nothing but the making of the batch.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        seed: int,
        shuffle: bool,
        batch_size: Callable[[int, int], int],
        device: torch.device,
        position: int,
        step: int,
        tokens: int,
    ) -> None:
        self._sequences = sequences
        self._seed, self._shuffle = seed, shuffle
        self._batch_size = batch_size
        self._device = device
        self._position, self._step, self._tokens = position, step, tokens
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: deque[tuple[Batch, torch.cuda.Event | None]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()  # guards the three above
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The batch of the next step.  Raises what the thread has raised, after the batches made before."""
        with self._changed:
            while not self._ready:
                if self._error is not None:
                    raise self._error
                if self._closed or not self._thread.is_alive():
                    raise RuntimeError("the loader is closed, or its thread did not survive a fork")
                self._changed.wait(WATCH_SECONDS)
            batch, copied = self._ready.popleft()
            self._changed.notify_all()
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for tensor in (batch.inputs, batch.targets):
                tensor.record_stream(current)  # its memory is the copying stream's, which must not reuse it before
        return batch

    def close(self) -> None:
        """End the thread; it finishes at most the batch that it is making."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._wait_for_room():
                made = self._make()
                with self._changed:
                    self._ready.append(made)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until a batch is wanted; False if none ever will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < PREFETCH)
            return not self._closed

    def _make(self) -> tuple[Batch, torch.cuda.Event | None]:
        size = self._batch_size(self._step, self._tokens)
        positions = np.arange(self._position, self._position + size)
        indices = order(positions, len(self._sequences), self._seed, self._shuffle)
        inputs, targets = self._sequences.gather(indices)
        num_targets = int(np.count_nonzero(targets != IGNORE))
        self._position += size
        self._step += 1
        self._tokens += num_targets
        if self._stream is None:
            return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), num_targets), None
        with torch.cuda.stream(self._stream):  # also makes its device this thread's
            batch = Batch(self._copy(inputs), self._copy(targets), num_targets)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return batch, copied

    def _copy(self, array: np.ndarray) -> torch.Tensor:
        # torch keeps the pinned memory until the copy is through, and uses it again after
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)
