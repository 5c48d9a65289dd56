"""Exponential decay: every step multiplies the learning rate by the same factor."""

from dataclasses import dataclass

from llmtrain.base.checks import fraction, positive
from llmtrain.schedule.warmup import WarmupDecay


@dataclass(frozen=True)
class Exponential(WarmupDecay):
    """``peak * decay_rate ** ((step - warmup) / decay_steps)``, not below ``min_lr``.

    Without ``decay_rate`` and ``decay_steps`` the decay ends at ``min_lr``:
    ``peak * (min_lr / peak) ** progress``, progress = (step - warmup) / (total - warmup).
    """

    decay_rate: float | None
    decay_steps: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(decay_rate=self.decay_rate, decay_steps=self.decay_steps)
        fraction(decay_rate=self.decay_rate)
        if (self.decay_rate is None) != (self.decay_steps is None):
            raise ValueError(f"decay_rate={self.decay_rate}, decay_steps={self.decay_steps}: give both or neither")
        if self.decay_rate is None and self.min_lr == 0:
            raise ValueError("min_lr=0.0: an exponential decay never reaches 0; give min_lr > 0 or a decay_rate")

    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        if self.decay_rate is None or self.decay_steps is None:
            return peak * (self.min_lr / peak) ** ((step - warmup) / (total - warmup))
        return max(self.min_lr, peak * self.decay_rate ** ((step - warmup) / self.decay_steps))
