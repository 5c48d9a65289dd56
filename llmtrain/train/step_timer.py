"""Timing of the phases of a training step: a mark at each boundary, read when the device has passed it."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from llmtrain.train.profiler import Profiler

PHASES = ("data", "forward", "backward", "optimizer")  # the rest of a step is "other"

Lap = list[tuple[str, Any]]  # the marks of a step: the phase that ends there, and a time or a CUDA event


class StepTimer:
    """Seconds in each of :data:`PHASES`.

    On a CPU a mark reads ``clock``.  On a GPU it is an event between the kernels, so that the device's work is timed
    and not its launching; the events of a step are read once they have passed (:meth:`read`), without waiting, and
    then reused.  Each mark is passed on to ``profiler``.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float], profiler: Profiler) -> None:
        self._is_cuda = device.type == "cuda"
        self._clock = clock
        self.profiler = profiler
        self._pool: list[torch.cuda.Event] = []
        self._lap: Lap = []
        self._laps: deque[Lap] = deque()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.total: dict[str, float] = dict.fromkeys((*PHASES, "other"), 0.0)  # of all time taken so far

    def start(self) -> None:
        """Begin a step, and discard one that was not finished."""
        self._pool += [moment for _, moment in self._lap if self._is_cuda]
        self._lap = []
        self.mark("other")

    def mark(self, phase: str) -> None:
        """Assign the time since the last mark to ``phase``, one of :data:`PHASES` or "other"."""
        if self._is_cuda:
            event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
            event.record()
            self._lap.append((phase, event))
        else:
            self._lap.append((phase, self._clock()))
        if self.profiler.on_phase_end is not None:
            self.profiler.on_phase_end(phase)

    def finish(self) -> None:
        """End the step."""
        self._laps.append(self._lap)
        self._lap = []

    def read(self) -> None:
        """Add the times of the oldest finished step, which the device must have completed."""
        lap = self._laps.popleft()
        for (_, begin), (phase, end) in pairwise(lap):
            if phase in self._seconds:
                self._seconds[phase] += begin.elapsed_time(end) / 1000 if self._is_cuda else end - begin
        self._pool += [moment for _, moment in lap if self._is_cuda]

    def take(self, seconds: float) -> dict[str, float]:
        """Divide ``seconds``, the time since the last call, among the phases and "other", and reset.

        The parts add up to ``seconds``.  On a GPU the device is up to two steps behind the host's clock; if it was
        therefore busy for longer than ``seconds``, each phase gets its share of them.
        """
        busy = sum(self._seconds.values())
        scale = min(1.0, seconds / busy) if busy else 1.0
        parts = {phase: value * scale for phase, value in self._seconds.items()}
        parts["other"] = max(seconds - sum(parts.values()), 0.0)
        self.forget()
        for phase, value in parts.items():
            self.total[phase] += value
        return parts

    def forget(self) -> None:
        """Discard the times since the last call of :meth:`take`."""
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def shares(self) -> dict[str, float] | None:
        """Each phase's share of all time taken so far, adding up to 1; None before there is any."""
        whole = sum(self.total.values())
        return {phase: value / whole for phase, value in self.total.items()} if whole else None
