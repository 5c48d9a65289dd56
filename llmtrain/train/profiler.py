"""``runtime.profile=true``: a few steps through torch's profiler.

From the fifth to the seventh step of a session, when all that is done once has been done, into
``RUN/profile/step-00000005/``: ``trace.json.gz`` (opens in https://ui.perfetto.dev), ``operations.txt`` (what took the
most time) and ``memory.png`` (what memory held, by category).  The steps compute what they would without it.
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

FIRST, LAST = 5, 7  # steps of the session, counted from 1; the one before the first warms the profiler up
TRACE, OPERATIONS, MEMORY = "trace.json.gz", "operations.txt", "memory.png"
BOUNDARY = "llmtrain: end of "  # how the trace names the boundaries between phases
WIDTH = 120  # columns of operations.txt
MAX_ROWS = 40  # of each of its tables
NAME_WIDTH = 40


class ProfileResult(NamedTuple):
    """What was made of a recording."""

    path: Path | None  # its folder; None where there is nothing
    message: str


class Profiler:
    """Profiles nothing: ``runtime.profile=false``."""

    on_phase_end: Callable[[str], None] | None = None  # is to hear the end of each phase of a step
    path: Path | None = None  # of what was written

    def step(self) -> bool:
        """To be called after each step; True where :meth:`write` is to be called now."""
        return False

    def write(self) -> ProfileResult:
        """End the recording and write what there is of it; takes seconds."""
        raise AssertionError("nothing is recorded")

    @property
    def is_unfinished(self) -> bool:
        """Whether :meth:`write` is still to be called."""
        return False

    def close(self) -> None:
        """Let go of the profiler, whatever has been recorded."""


class StepProfiler(Profiler):
    """Profiles the steps FIRST to LAST that it is told of; ``step`` is how many the run has done before.

    ``directory`` is the run's; ``state_bytes`` the size of the optimizer's state.
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
        self._gradients: list[frozenset[int]] = []  # at each boundary that is recorded
        self._is_through = False

    @property
    def is_unfinished(self) -> bool:
        return not self._is_through

    @property
    def _is_recording(self) -> bool:
        return FIRST - 1 <= self._steps < LAST and not self._is_through

    def step(self) -> bool:
        self._steps += 1
        if self._is_through:
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
        recorded, self._is_through = self._torch, True
        self._torch = None
        if recorded is not None:
            recorded.stop()
        if recorded is None or last < FIRST:
            wanted = f"the steps {self._before + FIRST:,} to {self._before + LAST:,} are"
            return ProfileResult(None, f"there is none: {wanted} profiled, and this session ended before them")
        path = self._directory / PROFILE / f"step-{self._before + FIRST:08d}"
        aside = self._directory / f".tmp-profile-{os.getpid()}"  # what a killed process leaves of it is swept
        try:
            aside.mkdir()
            found = self._write_files(recorded, aside, f"{self._directory.name}, {steps}", last - FIRST + 1)
            path.parent.mkdir(exist_ok=True)
            if path.exists():  # of a session that started from the same checkpoint
                shutil.rmtree(path)
            aside.rename(path)
        except (OSError, ValueError, RuntimeError) as error:  # a full disk, a trace that is not JSON: no reason to stop
            shutil.rmtree(aside, ignore_errors=True)
            return ProfileResult(None, f"{steps} could not be written: {type(error).__name__}: {error}")
        self.path = path
        files = f"{path / TRACE} (opens in https://ui.perfetto.dev), {OPERATIONS}, {MEMORY}"
        return ProfileResult(path, f"{steps}: {files}{found}")

    def _write_files(self, recorded: profile, folder: Path, title: str, steps: int) -> str:
        """Write the three files; returns what is to be said about them beyond their names."""
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
            return "; nothing was recorded of the GPU itself (is this user allowed to profile it?)"
        return ""

    def close(self) -> None:
        if self._torch is not None:
            self._torch.stop()
            self._torch = None
        self._is_through = True


def find_boundaries(events: Sequence[dict[str, Any]], gradients: Sequence[frozenset[int]]) -> list[PhaseBoundary]:
    """The boundaries between phases in a trace, in their order, with the addresses that were noted at each.

    Raises ValueError if the trace has others.
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
    """Events for a trace that show the phases as a track of their own."""
    for before, boundary in pairwise(boundaries):
        yield {
            "ph": "X", "cat": "llmtrain", "name": boundary.phase, "pid": "llmtrain", "tid": "phases",
            "ts": before.microseconds, "dur": boundary.microseconds - before.microseconds, "args": {},
        }  # fmt: skip


# --- operations.txt ------------------------------------------------------------------------------------------------


def is_operation(row: Any) -> bool:
    """Whether a row of the profiler's averages is work, and not the name of a stretch."""
    return not row.is_user_annotation and not row.key.startswith((BOUNDARY, "ProfilerStep"))


def operations(rows: Sequence[Any], title: str, steps: int, *, is_cuda: bool) -> Iterator[str]:
    """The lines of ``operations.txt``, WIDTH columns at most, from the profiler's averages by name and shapes."""
    yield f"{title}: operations by the time they took themselves, without those they called"
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
    seen = 0.0
    for row in rows[:MAX_ROWS]:
        time = getattr(row, key)
        seen += time
        name = _shortened(row.key) if row.input_shapes else row.key
        line = (
            f"{time / 1000 / steps:>10,.3f} {time / total:>6.1%} {seen / total:>6.1%} {row.count / steps:>12,.1f} "
            f"{time / row.count:>10,.1f}  {name:<{NAME_WIDTH}}  {_shapes(row.input_shapes)}"
        ).rstrip()
        yield line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
    if len(rows) > MAX_ROWS:
        yield f"… and {len(rows) - MAX_ROWS:,} more"


def _shortened(name: str) -> str:
    """At most NAME_WIDTH characters, with both ends, as in ``aten::_scaled_dot_pr…ttention_for_cpu_backward``."""
    tail = NAME_WIDTH * 3 // 5
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - tail - 1] + "…" + name[-tail:]


def _shapes(shapes: Any) -> str:
    """``8×256×768, 768×768``; what is no tensor is left out."""
    return ", ".join("×".join(map(str, shape)) for shape in shapes or () if shape)
