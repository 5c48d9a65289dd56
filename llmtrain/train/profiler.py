"""``runtime.profile=true``: a few steps recorded by torch's profiler.

The fifth to the seventh step of a session, after all one-time work, are written to ``RUN/profile/step-00000005/``:
``trace.json.gz`` (opens in https://ui.perfetto.dev), ``operations.txt`` (the operations by time) and ``memory.png``
(memory by category).  Profiling does not change the results of the steps.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from llmtrain.base.run_files import PROFILE
from llmtrain.train import memory_timeline
from llmtrain.train.memory_timeline import PhaseBoundary, Timeline

FIRST, LAST = 5, 7  # steps of the session, counted from 1; the step before FIRST warms the profiler up
TRACE, OPERATIONS, MEMORY = "trace.json.gz", "operations.txt", "memory.png"
BOUNDARY = "llmtrain: end of "  # prefix of the boundaries between phases in a trace
WIDTH = 120  # columns of operations.txt
MAX_ROWS = 40  # of each of its tables
NAME_WIDTH = 40


class ProfileResult(NamedTuple):
    """The files written from a recording, or the reason why there are none."""

    path: Path | None  # the folder of the files; None if there are none
    message: str


class Profiler:
    """A profiler that records nothing: ``runtime.profile=false``."""

    on_phase_end: Callable[[str], None] | None = None  # to be called at the end of each phase of a step
    path: Path | None = None  # the folder of the files written

    def step(self) -> bool:
        """Advance after each step; return True when :meth:`write` is due."""
        return False

    def write(self) -> ProfileResult:
        """End the recording and write its files, which takes seconds."""
        raise AssertionError("nothing is recorded")

    @property
    def is_unfinished(self) -> bool:
        """True while :meth:`write` is still to be called."""
        return False

    def close(self) -> None:
        """Release the profiler and discard what is not written."""


class StepProfiler(Profiler):
    """A profiler of the session's steps FIRST to LAST; ``step`` is the number of steps that the run did before.

    ``directory`` is the run's; ``state_bytes`` is the size of the optimizer's state.
    """

    def __init__(
        self, directory: Path, device: torch.device, step: int, parameters: Sequence[Tensor], state_bytes: int
    ) -> None:
        self.on_phase_end = self._end_phase
        self._directory = directory
        self._device = device
        self._before = step
        self._parameters = parameters
        self._state_bytes = state_bytes
        self._steps = 0  # of this session
        self._torch: profile | None = None
        self._gradients: list[frozenset[int]] = []  # addresses at each recorded boundary
        self._is_done = False

    @property
    def is_unfinished(self) -> bool:
        return not self._is_done

    @property
    def _is_recording(self) -> bool:
        return FIRST - 1 <= self._steps < LAST and not self._is_done

    def step(self) -> bool:
        self._steps += 1
        if self._is_done:
            return False
        if self._steps == FIRST - 2:
            self._start()
        elif FIRST - 2 < self._steps < LAST:
            assert self._torch is not None
            self._torch.step()
        return self._steps == LAST

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=0, warmup=1, active=LAST - FIRST + 1, repeat=1)
        self._torch = profile(activities=activities, schedule=plan, record_shapes=True, profile_memory=True)
        self._torch.start()

    def _end_phase(self, phase: str) -> None:
        if self._is_recording:
            with record_function(BOUNDARY + phase):
                pass
            made = [p.grad for p in self._parameters if p.grad is not None] if phase == "backward" else []
            self._gradients.append(frozenset(gradient.untyped_storage().data_ptr() for gradient in made))

    def write(self) -> ProfileResult:
        last = min(self._steps, LAST)
        steps = f"steps {self._before + FIRST:,} to {self._before + last:,}"
        recorded, self._is_done = self._torch, True
        self._torch = None
        if recorded is not None:
            recorded.stop()
        if recorded is None or last < FIRST:
            wanted = f"steps {self._before + FIRST:,} to {self._before + LAST:,} are"
            return ProfileResult(None, f"none written: {wanted} profiled, and this session ended before them")
        path = self._directory / PROFILE / f"step-{self._before + FIRST:08d}"
        aside = self._directory / f".tmp-profile-{os.getpid()}"  # left by a killed process, removed later
        try:
            aside.mkdir()
            found = self._write_files(recorded, aside, f"{self._directory.name}, {steps}", last - FIRST + 1)
            path.parent.mkdir(exist_ok=True)
            if path.exists():  # of a session that started from the same checkpoint
                shutil.rmtree(path)
            aside.rename(path)
        except (OSError, ValueError, RuntimeError) as error:  # a full disk or a broken trace must not stop the run
            shutil.rmtree(aside, ignore_errors=True)
            return ProfileResult(None, f"{steps} could not be written: {type(error).__name__}: {error}")
        self.path = path
        files = f"{path / TRACE} (opens in https://ui.perfetto.dev), {OPERATIONS}, {MEMORY}"
        return ProfileResult(path, f"{steps}: {files}{found}")

    def _write_files(self, recorded: profile, folder: Path, title: str, steps: int) -> str:
        """Write the three files; return a remark about them for the message, mostly empty."""
        plain = folder / "trace.json"
        recorded.export_chrome_trace(str(plain))
        trace = json.loads(plain.read_text(encoding="utf-8"))
        plain.unlink()
        events = trace["traceEvents"]
        boundaries = find_boundaries(events, self._gradients)
        trace["traceEvents"] = [*events, *phase_track(boundaries)]
        with gzip.open(folder / TRACE, "wt", encoding="utf-8", compresslevel=5) as file:
            json.dump(trace, file)
        is_cuda = self._device.type == "cuda"
        weights = sum(parameter.nbytes for parameter in self._parameters)
        timeline = Timeline.of(events, boundaries, is_cuda=is_cuda, weights=weights, state=self._state_bytes)
        memory_timeline.draw(timeline, folder / MEMORY, f"memory, {title}")
        rows = [row for row in recorded.key_averages(group_by_input_shape=True) if is_operation(row)]
        text = "\n".join(operations(rows, title, steps, is_cuda=is_cuda))
        (folder / OPERATIONS).write_text(text + "\n", encoding="utf-8")
        if is_cuda and not any(row.self_device_time_total for row in rows):
            return "; the GPU itself was not recorded (is this user allowed to profile it?)"
        return ""

    def close(self) -> None:
        if self._torch is not None:
            self._torch.stop()
            self._torch = None
        self._is_done = True


def find_boundaries(events: Sequence[dict[str, Any]], gradients: Sequence[frozenset[int]]) -> list[PhaseBoundary]:
    """Find the boundaries between phases in a trace, in order, and add the addresses recorded at each.

    Raises ValueError if their numbers differ.
    """
    marks = [event for event in events if event.get("ph") == "X" and str(event.get("name")).startswith(BOUNDARY)]
    marks = [event for event in marks if event.get("cat") == "user_annotation"]  # on a GPU there is a second track
    marks.sort(key=lambda event: event["ts"])
    if len(gradients) != len(marks):
        raise ValueError(f"the trace has {len(marks)} boundaries between phases instead of {len(gradients)}")
    return [
        PhaseBoundary(event["ts"], event["name"].removeprefix(BOUNDARY), addresses)
        for event, addresses in zip(marks, gradients, strict=True)
    ]


def phase_track(boundaries: Sequence[PhaseBoundary]) -> Iterator[dict[str, Any]]:
    """Yield trace events that show the phases as a track of their own."""
    for before, boundary in pairwise(boundaries):
        yield {
            "ph": "X", "cat": "llmtrain", "name": boundary.phase, "pid": "llmtrain", "tid": "phases",
            "ts": before.microseconds, "dur": boundary.microseconds - before.microseconds, "args": {},
        }  # fmt: skip


# --- operations.txt ------------------------------------------------------------------------------------------------


def is_operation(row: Any) -> bool:
    """Return whether a row of the profiler's averages is an operation, and not an annotation."""
    return not row.is_user_annotation and not row.key.startswith((BOUNDARY, "ProfilerStep"))


def operations(rows: Sequence[Any], title: str, steps: int, *, is_cuda: bool) -> Iterator[str]:
    """Yield the lines of ``operations.txt``, at most WIDTH columns, from the averages by name and shapes."""
    yield f"{title}: operations by their own time, without the operations they call"
    host = [row for row in rows if row.device_type == torch.autograd.DeviceType.CPU]
    if is_cuda:
        kernels = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA]
        yield from _table("on the GPU, by operation", host, "self_device_time_total", steps)
        yield from _table("on the GPU, by kernel", kernels, "self_device_time_total", steps)
    yield from _table("on the host", host, "self_cpu_time_total", steps)


def _table(heading: str, rows: Sequence[Any], key: str, steps: int) -> Iterator[str]:
    rows = sorted((row for row in rows if getattr(row, key) > 0), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)  # microseconds
    yield ""
    yield f"{heading}: {total / 1000 / steps:,.3f} ms a step"
    columns = f"{'ms a step':>10} {'share':>6} {'sum':>6} {'calls a step':>12} {'us a call':>10}"
    yield f"{columns}  {'operation':<{NAME_WIDTH}}  shapes"
    shown = 0.0
    for row in rows[:MAX_ROWS]:
        time = getattr(row, key)
        shown += time
        name = _shortened(row.key) if row.input_shapes else row.key
        line = (
            f"{time / 1000 / steps:>10,.3f} {time / total:>6.1%} {shown / total:>6.1%} {row.count / steps:>12,.1f} "
            f"{time / row.count:>10,.1f}  {name:<{NAME_WIDTH}}  {_shapes(row.input_shapes)}"
        ).rstrip()
        yield line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
    if len(rows) > MAX_ROWS:
        yield f"… and {len(rows) - MAX_ROWS:,} more"


def _shortened(name: str) -> str:
    """Shorten to NAME_WIDTH characters, keeping both ends, as in ``aten::_scaled_dot_pr…ttention_for_cpu_backward``."""
    tail = NAME_WIDTH * 3 // 5
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - tail - 1] + "…" + name[-tail:]


def _shapes(shapes: Any) -> str:
    """Format shapes as ``8×256×768, 768×768``; arguments that are no tensors are left out."""
    return ", ".join("×".join(map(str, shape)) for shape in shapes or () if shape)
