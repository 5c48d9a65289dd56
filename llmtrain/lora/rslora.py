"""Rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""

import math
from dataclasses import dataclass

from llmtrain.lora.low_rank import LowRankAdaptation


@dataclass(frozen=True)
class RsLoRA(LowRankAdaptation):
    """``W x + (alpha / sqrt(rank)) B A x``: activations and gradients keep their scale at any rank."""

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.rank)
