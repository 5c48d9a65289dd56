"""The peak learning rate at every step."""

from dataclasses import dataclass

from llmtrain.schedule.warmup import Warmup


@dataclass(frozen=True)
class Constant(Warmup):
    """The peak, from the first step on unless a warm-up is asked for."""

    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        return peak
