"""A constant learning rate."""

from dataclasses import dataclass

from llmtrain.schedule.warmup import Warmup


@dataclass(frozen=True)
class Constant(Warmup):
    """The peak at every step, after an optional warm-up."""

    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        return peak
