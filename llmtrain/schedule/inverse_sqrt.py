"""Inverse square root decay (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, as in fairseq and T5)."""

import math
from dataclasses import dataclass

from llmtrain.schedule.warmup import Warmup


@dataclass(frozen=True)
class InverseSqrt(Warmup):
    """``peak * sqrt(warmup / step)`` after the warm-up, independent of ``total``.  A warm-up of 0 counts as 1."""

    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        return peak * math.sqrt(max(warmup, 1) / max(step, 1))
