"""Checkpoints written while training continues.

Weights and optimizer state change in one place, the optimizer's step.  So a save only starts a copy to the host, which
runs beside the next forward and backward pass; the next update waits for it, on a GPU without holding up the host.
Hashing, writing, syncing, renaming, reading back and the removal of older checkpoints follow in a thread of low
priority.  At most one save is under way; its result is reported to the training thread, which alone writes metrics and
decides.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.base.device import available_memory
from llmtrain.base.format import size
from llmtrain.base.run_files import CHECKPOINTS
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import find_checkpoints, step_of
from llmtrain.checkpoint.format import confirm_checkpoint, remove_checkpoint, verify_checkpoint, write_checkpoint
from llmtrain.checkpoint.policy import Checkpoint
from llmtrain.checkpoint.restore import newest_intact
from llmtrain.metrics import ValidationScore

NICENESS = 10  # of the writing thread: it takes the time that the training threads leave
COPY_BYTES = 1 << 24  # copied at once on a CPU


class RunDirectoryGone(Exception):
    """The directory of a run is no longer where the run found it."""


@dataclass
class SaveResult:
    """The outcome of one save."""

    step: int
    path: Path
    seconds: float = 0.0  # from the call to the end of the last task
    held_seconds: float = 0.0  # of these, spent by the training thread
    error: Exception | None = None  # not written, or read back differently
    copied: bool = False  # True: written from a copy; the next update waits for the copy alone
    removed: list[int] = field(default_factory=list)  # steps whose checkpoints were removed after it
    damaged: list[str] = field(default_factory=list)  # messages about damaged older checkpoints


class Snapshot:
    """Host copies of tensors at one moment.  The buffers are reused by the next save."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: dict[str, dict[str, Tensor]] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []  # copy, source
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._event: torch.cuda.Event | None = None
        self._copied = threading.Event()
        self._copied.set()

    def begin(self, **groups: dict[str, Tensor]) -> None:
        """Start to copy the tensors, which must not change until :meth:`before_change` has returned."""
        before, self.copies, self._pairs = self.copies, {}, []
        for group, tensors in groups.items():
            buffers = before.get(group, {})
            self.copies[group] = {name: self._buffer(buffers.get(name), tensor) for name, tensor in tensors.items()}
            self._pairs += [(self.copies[group][name], tensor.detach()) for name, tensor in tensors.items()]
        if self._stream is None:
            self._copied.clear()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for copy, source in self._pairs:
                copy.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(self._stream)

    def _buffer(self, old: Tensor | None, source: Tensor) -> Tensor:
        if old is not None and (old.shape, old.dtype) == (source.shape, source.dtype):
            return old
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=self._stream is not None)

    def finish(self) -> None:
        """In the writing thread: copy, or wait until the device has copied."""
        try:
            if self._event is not None:
                self._event.synchronize()
            else:
                for copy, source in self._pairs:
                    _copy(copy, source)
        finally:
            self._pairs = []
            self._copied.set()

    def before_change(self) -> None:
        """In the training thread, before the update: wait for the copy; on a GPU only the stream waits."""
        if self._event is not None:
            torch.cuda.current_stream(self.device).wait_event(self._event)
        elif not self._copied.is_set():
            self._copied.wait()


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy on one thread and without Python's lock; torch would start threads that compete with training's."""
    if not source.is_contiguous():
        target.copy_(source)
        return
    left, right = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (target, source))
    for start in range(0, len(right), COPY_BYTES):
        np.copyto(left[start : start + COPY_BYTES], right[start : start + COPY_BYTES])


class Saver(AbstractContextManager["Saver"]):
    """Writes the checkpoints of one run in ``run_dir`` by ``policy``.  A context manager, whose exit waits for the save
    under way.

    ``config_text`` is the run's ``config.yaml``, which each checkpoint holds.  ``can_restore`` returns whether a
    checkpoint's optimizer state is of the kind of optimizer that the run has now.
    """

    def __init__(
        self,
        policy: Checkpoint,
        run_dir: Path,
        device: torch.device,
        *,
        config_text: str,
        can_restore: Callable[[Path], bool] = lambda checkpoint: True,
    ) -> None:
        self.policy = policy
        self.run_dir = run_dir
        place = run_dir.stat()
        self._place = (place.st_dev, place.st_ino)
        self.intact: set[Path] = set()  # written and read back here, or compared with their manifests
        self.damaged: set[Path] = set()
        self.is_behind = policy.asynchronous  # True: training continues while a checkpoint is written
        self._config_text = config_text
        self._can_restore = can_restore
        self._snapshot = Snapshot(device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_lower_priority)
        self._future: Future[None] | None = None
        self._saved: SaveResult | None = None  # of the save that is under way
        self._begun = 0.0

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the run, oldest first."""
        return find_checkpoints(self.run_dir)

    def newest_to_roll_back_to(self, *, at_most: int) -> tuple[Path | None, list[CheckpointError]]:
        """The newest intact checkpoint up to step ``at_most`` whose optimizer state fits, and the errors of others."""
        fitting = [path for path in self.checkpoints() if self._can_restore(path)]
        return newest_intact(fitting, at_most=at_most, known=self.intact)

    def check_memory(self, num_bytes: int) -> str | None:
        """Switch to waiting if host memory has no room for a copy of ``num_bytes``; return the message about it."""
        available = available_memory()
        if not self.is_behind or available is None or available > 1.25 * num_bytes:
            return None
        self.is_behind = False
        return (
            f"checkpoint.asynchronous=true: a copy for it takes {size(num_bytes)} of host memory and {size(available)} "
            "are free; training waits while a checkpoint is written, as with checkpoint.asynchronous=false"
        )

    def begin(
        self,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        scores: Mapping[int, ValidationScore],
        *,
        copied: bool = True,
    ) -> None:
        """Start to write a checkpoint.  The result of the save before must have been collected.

        ``scores``: of the validations by step, the least being the best.  Without ``copied`` the checkpoint is written
        from the tensors themselves, and an update waits until it is written.
        """
        assert self._future is None
        self._begun = time.perf_counter()
        path = self.run_dir / CHECKPOINTS / f"step-{state['step']:08d}"
        self._saved = saved = SaveResult(state["step"], path)
        scores = dict(scores)
        saved.copied = self.is_behind and copied
        if saved.copied:
            self._snapshot.begin(model=model, optimizer=optimizer)

            def work() -> None:
                self._snapshot.finish()
                copies = self._snapshot.copies
                self._write(saved, copies["model"], copies["optimizer"], state, scores)
        else:

            def work() -> None:
                self._write(saved, model, optimizer, state, scores)

        self._future = self._pool.submit(work)
        if self.is_behind:
            saved.held_seconds = time.perf_counter() - self._begun
        else:
            self._wait()

    def before_update(self) -> None:
        """Wait as far as needed; call it before weights or optimizer state change."""
        if self._saved is None:
            return
        if not self._saved.copied:
            self._wait()
        else:
            start = time.perf_counter()
            self._snapshot.before_change()
            self._saved.held_seconds += time.perf_counter() - start

    def collect(self, *, wait: bool) -> SaveResult | None:
        """Return the result of the save under way, once; None if there is none, or it has not ended."""
        if self._future is None or not (wait or self._future.done()):
            return None
        self._wait()
        saved, self._future, self._saved = self._saved, None, None
        return saved

    def _wait(self) -> None:
        """Wait for the save under way.  Its time counts as training's."""
        assert self._future is not None
        assert self._saved is not None
        start = time.perf_counter()
        self._future.result()
        self._saved.held_seconds += time.perf_counter() - start

    def check_place(self) -> None:
        """Raise :class:`RunDirectoryGone` if the run directory was removed, renamed or replaced."""
        try:
            now = self.run_dir.stat()
        except FileNotFoundError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != self._place:
            raise RunDirectoryGone(
                f"{self.run_dir}: the run directory was removed, renamed or replaced while the run was working in it; "
                "what was trained since then is lost; leave it in its place until the run has ended"
            )

    def close(self) -> None:
        """Wait for the end of the save under way."""
        self._pool.shutdown(wait=True)

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _write(
        self,
        saved: SaveResult,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        scores: Mapping[int, ValidationScore],
    ) -> None:
        try:
            self.intact.discard(saved.path)
            self.damaged.discard(saved.path)
            self.check_place()
            write_checkpoint(saved.path, model=model, optimizer=optimizer, state=state, config=self._config_text)
            confirm_checkpoint(saved.path, model=model, optimizer=optimizer)
            self.intact.add(saved.path)
            self._remove_superfluous(saved, scores)
        except Exception as error:  # reported on the training thread, which decides what it means
            saved.error = error
        saved.seconds = time.perf_counter() - self._begun

    def _remove_superfluous(self, saved: SaveResult, scores: Mapping[int, ValidationScore]) -> None:
        """Remove checkpoints that the policy does not keep; damaged ones are neither counted nor removed."""
        for path in self.checkpoints():
            if path not in self.intact and path not in self.damaged:
                try:
                    verify_checkpoint(path)
                    self.intact.add(path)
                except CheckpointError as error:
                    self.damaged.add(path)
                    saved.damaged.append(str(error))
        for step in sorted(self.policy.superfluous([step_of(path) for path in self.intact], scores)):
            path = next(path for path in self.intact if step_of(path) == step)
            remove_checkpoint(path)
            self.intact.discard(path)
            saved.removed.append(step)


def _lower_priority() -> None:
    if sys.platform == "linux":  # the only system where threads have their own priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
