"""Checkpoints written while training continues.

Weights and optimizer state change in one place, the optimizer's step.  So a save only starts a copy to the host, which
runs beside the next forward and backward pass; the next update waits for it, on a GPU without holding up the host.
Hashing, writing, syncing, renaming, reading back and the removal of older checkpoints follow in a thread of low
priority.  At most one save is under way; its result is reported to the training thread, which alone writes metrics and
decides.

Several ranks write one checkpoint together: the thread of each writes the parts that its rank owns, and they agree on
every stage over a world of their own, so that a save succeeds on all ranks or fails on all.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.device import available_memory
from llmtrain.base.format import size
from llmtrain.base.host_memory import Registration, registration_for
from llmtrain.base.places import Places
from llmtrain.base.run_files import CHECKPOINTS
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.base.world import Alone, World
from llmtrain.checkpoint.agreement import Agreement, RunDirectoryGone
from llmtrain.checkpoint.directory import find_checkpoints, step_of
from llmtrain.checkpoint.format import remove_checkpoint, verify_checkpoint
from llmtrain.checkpoint.parts import Part, Tensors, model_parts, owned, state_parts
from llmtrain.checkpoint.policy import Checkpoint
from llmtrain.checkpoint.restore import newest_intact
from llmtrain.checkpoint.sharded import write_together
from llmtrain.checkpoint.snapshot import Snapshot, layouts_of
from llmtrain.metrics import ValidationScore

NICENESS = 10  # of the writing thread: it takes the time that the training threads leave
SPARE_BYTES = 1 << 30  # of host memory that a copy leaves to others, or a quarter of the copy if that is less


@dataclass
class SaveResult:
    """The outcome of one save.

    All ranks have an ``error`` or none; after a success ``seconds``, ``removed`` and ``damaged`` are alike too.
    """

    step: int
    path: Path
    seconds: float = 0.0  # from the call to the end of the last task
    held_seconds: float = 0.0  # of these, spent by the training thread
    error: Exception | None = None  # not written, or read back differently
    copied: bool = False  # True: written from a copy; the next update waits for the copy alone
    removed: list[int] = field(default_factory=list)  # steps whose checkpoints were removed after it
    damaged: list[str] = field(default_factory=list)  # messages about damaged older checkpoints
    notice: str | None = None  # about a copy that is not made as it should be


class Saver(AbstractContextManager["Saver"]):
    """Writes the checkpoints of one run in ``run_dir`` by ``policy``.  A context manager, whose exit waits for the save
    under way.

    ``config_text`` is the run's ``config.yaml``, which each checkpoint holds.  ``can_restore`` returns whether a
    checkpoint's optimizer state is of the kind of optimizer that the run has now.  ``registration`` pins the memory
    that copies are made in; None: CUDA's where ``device`` is a GPU.

    ``world``: the ranks that save together, over connections that nothing else uses.  On every rank :meth:`begin` is
    called for the same steps and every save is collected; ``is_done`` may be earlier on one than on another.
    ``places``: of the parameters that this rank holds parts of; the others it holds as a whole, and rank 0 writes them.
    """

    def __init__(
        self,
        policy: Checkpoint,
        run_dir: Path,
        device: torch.device,
        *,
        config_text: str,
        can_restore: Callable[[Path], bool] = lambda checkpoint: True,
        registration: Registration | None = None,
        world: World | None = None,
        places: Places = MappingProxyType({}),
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
        self._ranks = Agreement(world or Alone())
        self._places = places
        self._snapshot = Snapshot(device, registration or registration_for(device))
        self._is_refusal_reported = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_lower_priority)
        self._prepared: Future[None] | None = None  # the making of the memory for copies
        self._future: Future[None] | None = None
        self._saved: SaveResult | None = None  # of the save that is under way
        self._begun = 0.0

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the run, oldest first."""
        return find_checkpoints(self.run_dir)

    def newest_to_roll_back_to(self, *, at_most: int) -> tuple[Path | None, list[CheckpointError]]:
        """The newest intact checkpoint up to step ``at_most`` whose optimizer state fits, and the errors of others.

        Rank 0 chooses; called on all ranks, with no save under way.
        """
        assert self._future is None

        def choose() -> tuple[str | None, list[str]]:
            fitting = [path for path in self.checkpoints() if self._can_restore(path)]
            path, errors = newest_intact(fitting, at_most=at_most, known=self.intact)
            return None if path is None else path.name, [str(error) for error in errors]

        name, messages = self._ranks.first(choose)
        path = None if name is None else self.run_dir / CHECKPOINTS / name
        return path, [CheckpointError(message) for message in messages]

    def prepare(self, model: Tensors, optimizer: Tensors, *, is_copied: bool) -> str | None:
        """Make ready for copies of these tensors; return a message if host memory has no room for them.

        In that case training waits while a checkpoint is written.  ``is_copied``: some save will be written from a
        copy.  Memory for it that has to be pinned, which takes a second for 1 to 3 GB, is made now, in the thread.
        Raises ValueError for optimizer state that cannot be divided among ranks.
        """
        layouts = layouts_of(_tensors_of(self._own(model, optimizer)))
        message = self.check_memory(sum(layout.num_bytes for layout in layouts.values()))
        if self.is_behind and is_copied and self._snapshot.registration is not None:
            self._prepared = self._pool.submit(self._snapshot.make, layouts)
        return message

    def check_memory(self, num_bytes: int) -> str | None:
        """Switch to waiting if host memory has no room for a copy of ``num_bytes``; return the message about it."""
        available = available_memory()
        if not self.is_behind or available is None or available > num_bytes + min(num_bytes // 4, SPARE_BYTES):
            return None
        return self._stop_copying(num_bytes, f"{size(available)} are free")

    def _stop_copying(self, num_bytes: int, reason: str) -> str:
        self.is_behind = False
        return (
            f"checkpoint.asynchronous=true: a copy for it takes {size(num_bytes)} of host memory, and {reason}; "
            "training waits while a checkpoint is written, as with checkpoint.asynchronous=false"
        )

    def begin(
        self,
        model: Tensors,
        optimizer: Tensors,
        state: dict[str, Any],
        scores: Mapping[int, ValidationScore],
        *,
        copied: bool = True,
    ) -> None:
        """Start to write a checkpoint.  The result of the save before must have been collected.

        ``model`` and ``optimizer``: the tensors as this rank holds them.  ``scores``: of the validations by step, the
        least being the best.  Without ``copied`` the checkpoint is written from the tensors themselves, and an update
        waits until it is written.
        """
        assert self._future is None
        self._begun = time.perf_counter()
        path = self.run_dir / CHECKPOINTS / f"step-{state['step']:08d}"
        self._saved = saved = SaveResult(state["step"], path)
        own = self._own(model, optimizer)
        saved.copied = copied and self._copy(saved, _tensors_of(own))
        work = partial(self._write, saved, own, state, dict(scores))
        self._future = self._pool.submit(work)
        if self.is_behind:
            saved.held_seconds = time.perf_counter() - self._begun
        else:
            self._wait()

    def _own(self, model: Tensors, optimizer: Tensors) -> dict[str, dict[str, Part]]:
        """The parts that this rank writes, by group and by key in its file."""
        is_first, places = self._ranks.world.is_first, self._places
        return {
            "model": owned(model_parts(model, places, is_first=is_first)),
            "optimizer": owned(state_parts(optimizer, model, places, is_first=is_first)),
        }

    def _copy(self, saved: SaveResult, groups: Mapping[str, Tensors]) -> bool:
        """Start a copy of the tensors; return False if saves are written without one."""
        if not self.is_behind:
            return False
        try:
            if self._prepared is not None:
                self._prepared.result()
            self._snapshot.begin(**groups)
        except OSError as error:
            self._snapshot.close()
            taken = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
            saved.notice = self._stop_copying(taken, f"the system has none left ({error.strerror})")
            return False
        if (reason := self._snapshot.refusal) is not None and not self._is_refusal_reported:
            self._is_refusal_reported = True
            saved.notice = (
                f"checkpoint.asynchronous=true: the host memory for a copy could not be pinned ({reason}); the copy is "
                "slower, and an update waits for it; free host memory, or raise the limit of locked memory (ulimit -l)"
            )
        return True

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

    @property
    def is_done(self) -> bool:
        """True if a save has ended on this rank and has not been collected."""
        return self._future is not None and self._future.done()

    def collect(self, *, wait: bool) -> SaveResult | None:
        """Return the result of the save under way, once; None if there is none, or it has not ended."""
        if self._future is None or not (wait or self.is_done):
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
        """Wait for the end of the save under way, and give the memory for copies back."""
        self._pool.shutdown(wait=True)
        self._snapshot.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _write(
        self,
        saved: SaveResult,
        own: Mapping[str, Mapping[str, Part]],
        state: dict[str, Any],
        scores: Mapping[int, ValidationScore],
    ) -> None:
        def prepare() -> Mapping[str, Mapping[str, Part]]:
            if not saved.copied:
                self.check_place()
                return own
            self._snapshot.finish()
            self.check_place()
            copies = self._snapshot.copies
            return {
                group: {key: part._replace(tensor=copies[group][key]) for key, part in parts.items()}
                for group, parts in own.items()
            }

        def finish() -> dict[str, Any]:
            self.intact.add(saved.path)
            self._remove_superfluous(saved, scores)
            saved.seconds = time.perf_counter() - self._begun
            return {name: getattr(saved, name) for name in ("seconds", "removed", "damaged")}

        try:
            self.intact.discard(saved.path)
            self.damaged.discard(saved.path)
            write_together(saved.path, self._ranks, state, self._config_text, prepare)
            for name, value in self._ranks.first(finish).items():
                setattr(saved, name, value)
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


def _tensors_of(own: Mapping[str, Mapping[str, Part]]) -> dict[str, dict[str, Tensor]]:
    return {group: {key: part.tensor for key, part in parts.items()} for group, parts in own.items()}


def _lower_priority() -> None:
    if sys.platform == "linux":  # the only system where threads have their own priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
