"""Cosine decay after a linear warm-up (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983)."""

import math
from dataclasses import dataclass

from llmtrain.schedule.warmup import WarmupDecay


@dataclass(frozen=True)
class WarmupCosine(WarmupDecay):
    """``min_lr + (peak - min_lr) * (1 + cos(pi * progress)) / 2``, progress = (step - warmup) / (total - warmup)."""

    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        progress = (step - warmup) / (total - warmup)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
