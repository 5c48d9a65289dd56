"""Warm-up, stable, decay (Hu et al. 2024, https://arxiv.org/abs/2404.06395).

The rate stays at the peak until the decay begins, so one long run can be decayed at several lengths.  Hägele et al.
2024, https://arxiv.org/abs/2405.18392, compare the shapes and find ``sqrt`` the best.
"""

import math
from dataclasses import dataclass
from enum import Enum

from llmtrain.base.checks import fraction, non_negative
from llmtrain.base.options import RunFacts
from llmtrain.schedule.warmup import WarmupDecay


class Shape(Enum):
    """The shape of the decay from the peak to ``min_lr``."""

    linear = "linear"
    cosine = "cosine"
    sqrt = "sqrt"

    def __call__(self, progress: float) -> float:
        """The remaining share of ``peak - min_lr`` at ``progress`` in [0, 1) of the decay."""
        match self:
            case Shape.linear:
                return 1 - progress
            case Shape.cosine:
                return 0.5 * (1 + math.cos(math.pi * progress))
            case Shape.sqrt:
                return 1 - math.sqrt(progress)


@dataclass(frozen=True)
class WSD(WarmupDecay):
    """The peak after the warm-up; in the last steps ``min_lr + (peak - min_lr) * shape(progress)``.

    The decay takes ``decay_steps`` if given, else ``round(decay_ratio * total)``; it never begins before the
    warm-up has ended.
    """

    decay_steps: int | None
    decay_ratio: float
    decay_shape: Shape

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(decay_steps=self.decay_steps)
        fraction(decay_ratio=self.decay_ratio)

    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        start = max(warmup, total - self.decay(total))
        if step < start:
            return peak
        return self.min_lr + (peak - self.min_lr) * self.decay_shape((step - start) / (total - start))

    def decay(self, total: int) -> int:
        """The number of decay steps in a run of ``total`` steps."""
        return round(self.decay_ratio * total) if self.decay_steps is None else self.decay_steps

    def unread(self, run: RunFacts) -> dict[str, str]:
        unread = super().unread(run)
        if self.decay_steps is not None:
            unread["decay_ratio"] = (
                f"schedule.decay_steps={self.decay_steps} is used instead; schedule.decay_steps=null"
            )
        if not self.decay(run.steps):
            why = "the learning rate never decays; schedule.decay_steps=null schedule.decay_ratio=0.2"
            unread |= {"decay_shape": why, "min_lr": why}
        return unread
