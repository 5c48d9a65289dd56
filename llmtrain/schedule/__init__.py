"""The learning rate as a pure function of the step.

An option is a frozen dataclass that is called with the step.  Nothing is stored: a resumed run computes the rate of its
step, which is that of an uninterrupted run.
"""

from abc import ABC, abstractmethod

from llmtrain.base.options import Option


class Schedule(Option, ABC):
    """Contract of ``schedule=...``."""

    @abstractmethod
    def __call__(self, step: int, *, peak: float, total: int) -> float:
        """The learning rate of optimizer step ``step`` (0-based) of a run of ``total`` steps.

        ``peak`` is ``optimizer.lr``.  Steps at or past ``total`` get the last value.
        """

    def warmup(self, total: int) -> int:
        """The number of warm-up steps in a run of ``total`` steps; 0 if the schedule has none."""
        return 0

    def check_peak(self, peak: float) -> None:
        """Raise ValueError if the schedule does not fit ``optimizer.lr``, such as a floor above the peak."""
