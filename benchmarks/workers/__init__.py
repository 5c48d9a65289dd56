"""The processes that measure: each module here is one, run as ``python -m benchmarks.workers.NAME TASK``.

A worker writes its result to stdout as one line of JSON behind ``RESULT``.  It imports what it measures inside of the
function, so that a package that is not there becomes an answer and not a traceback.
"""

import importlib.metadata
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.task import Task

MARK = "RESULT "


class Absent(Exception):
    """What is to be measured is not here; the message says what is missing."""


def serve(measure: Callable[[Task], dict[str, Any]], *packages: str) -> None:
    """Answer the task on the command line with ``measure``; ``packages``: whose versions belong to the result."""
    task = Task.from_json(sys.argv[1])
    try:
        result = measure(task)
    except (Absent, ModuleNotFoundError) as error:
        result = {"absent": str(error)}
    else:
        result["versions"] = {name: version for name in packages if (version := version_of(name))}
    print("\n" + MARK + json.dumps(result), flush=True)


def version_of(package: str) -> str | None:
    """The installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """The most bytes so far: allocated on a GPU, resident in this process on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def bytes_below(folder: Path) -> int:
    """Of all files in ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def training_result(task: Task, step_seconds: list[float], **more: Any) -> dict[str, Any]:
    """The result of a training worker, from the mean step seconds of each block that was measured."""
    if step_seconds:
        more["tokens_per_second"] = task.batch_size * task.context / statistics.median(step_seconds)
        more["step_seconds"] = step_seconds
    return more


class Stopwatch:
    """Times the steps of a peer's loop, which calls :meth:`step_done` at the end of each.

    The device is waited for after the first step, at the end of the warm-up and after each block of steps, so a loop
    that lets its host run ahead may go on doing so within a block.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._steps = 0
        self._mark = 0.0
        self._step_seconds: list[float] = []
        self._first_step_seconds = 0.0

    def step_done(self) -> bool:
        """Note the end of a step; returns whether it was the last that is wanted."""
        task = self._task
        self._steps += 1
        measured = self._steps - task.warm_up
        at_edge = measured >= 0 and measured % task.block == 0
        if self._steps == 1 or at_edge:
            synchronize(task.device)
        if self._steps == 1:
            self._first_step_seconds = time.time() - task.launched
        if at_edge:
            now = time.perf_counter()
            if measured > 0:
                self._step_seconds.append((now - self._mark) / task.block)
            self._mark = now
        return task.steps == 0 or measured >= task.steps

    def result(self, **more: Any) -> dict[str, Any]:
        """What a training worker answers."""
        memory = peak_memory(self._task.device)
        first = self._first_step_seconds
        return training_result(self._task, self._step_seconds, memory_bytes=memory, first_step_seconds=first, **more)
