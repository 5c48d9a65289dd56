"""AdamW with moments in bf16, rounded stochastically."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.optimizer.low_bit_adamw import CompactAdamW, Moments
from llmtrain.optimizer.stochastic_rounding import to_bf16


@dataclass(frozen=True)
class AdamWBF16(CompactAdamW):
    """Both moments in bf16: 4 bytes a parameter instead of 8; see :mod:`llmtrain.optimizer.stochastic_rounding`."""

    def moments(self, parameters: Sequence[Tensor]) -> Moments:
        return RoundedMoments()


class RoundedMoments(Moments):
    """Both moments stored in bf16."""

    def zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        return {moment: torch.zeros_like(parameter, dtype=torch.bfloat16) for moment in ("exp_avg", "exp_avg_sq")}

    def read(self, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        exp_avg, exp_avg_sq = kept
        return exp_avg.float(), exp_avg_sq.float()

    def write(self, exp_avg: Tensor, exp_avg_sq: Tensor, noise: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        return to_bf16(exp_avg, noise[0]), to_bf16(exp_avg_sq, noise[1])
