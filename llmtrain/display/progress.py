"""The progress of a run and its remaining time."""

import time
from collections.abc import Callable


class Progress:
    """Steps done and time taken.

    The remaining time is estimated from the steps after the first of this session, with evaluations and saves: the
    first also pays for compilation, warm-up of the device and the first batch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.current = 0
        self.max_steps = 0
        self._began: float | None = None
        self._first: tuple[int, float] | None = None  # the first step done in this session, and when

    def start(self, step: int, max_steps: int) -> None:
        """Start the clock with ``step`` of ``max_steps`` steps done."""
        self.current, self.max_steps = step, max_steps
        self._began, self._first = self._clock(), None

    def advance(self, step: int) -> None:
        """Record that ``step`` steps are done."""
        self.current = step
        if self._first is None:
            self._first = step, self._clock()

    @property
    def elapsed_seconds(self) -> float:
        """Return the seconds since the start of this session; 0 before."""
        return 0.0 if self._began is None else self._clock() - self._began

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate the seconds to the end; None before the second step of this session."""
        if self.current >= self.max_steps:
            return 0.0
        if self._first is None or self.current <= self._first[0]:
            return None
        step, moment = self._first
        return (self._clock() - moment) / (self.current - step) * (self.max_steps - self.current)

    def label(self, step: int) -> str:
        """Format ``step/max_steps``, with the same width for every step of the run."""
        total = f"{self.max_steps:,}"
        return f"{step:>{len(total)},}/{total}"
