"""AdamW with moments in 8 bits (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmtrain.optimizer.blockwise_quantization import BLOCK, Codebook, dequantise, quantise
from llmtrain.optimizer.groups import Member
from llmtrain.optimizer.low_bit_adamw import CompactAdamW, Moments
from llmtrain.optimizer.stochastic_rounding import BITS


@dataclass(frozen=True)
class AdamW8bit(CompactAdamW):
    """Both moments quantised by block: 2.03 bytes a parameter instead of 8.

    See :mod:`llmtrain.optimizer.blockwise_quantization`.

    As in the paper (section 2.3) embeddings keep fp32 moments, unless ``fp32_embeddings`` is false: most of their rows
    have no gradient in most steps, and a few rows have large gradients.
    """

    takes_shards: ClassVar[bool] = False  # the blocks of a shard are not those of the whole

    fp32_embeddings: bool

    def is_compact(self, member: Member) -> bool:
        return super().is_compact(member) and not (self.fp32_embeddings and member.layer == 0)

    def moments(self, parameters: Sequence[Tensor]) -> Moments:
        return QuantisedMoments(parameters[0].device)


class QuantisedMoments(Moments):
    """Codes (the parameter's shape, uint8) and scales (blocks,), a pair for each moment."""

    def __init__(self, device: torch.device) -> None:
        self.signed = Codebook.make(signed=True, device=device)
        self.unsigned = Codebook.make(signed=False, device=device)

    def zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        blocks = -(-parameter.numel() // BLOCK)
        state = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(parameter, dtype=torch.uint8)  # any code will do: the scale is 0
            state[f"{moment}_scale"] = torch.zeros(blocks, device=parameter.device)
        return state

    def read(self, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        codes, scales, codes_sq, scales_sq = kept
        return dequantise(codes, scales, self.signed), dequantise(codes_sq, scales_sq, self.unsigned)

    def write(self, exp_avg: Tensor, exp_avg_sq: Tensor, noise: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        first, second = ((numbers + 0.5) / (1 << BITS) for numbers in noise)
        return *quantise(exp_avg, self.signed, first), *quantise(exp_avg_sq, self.unsigned, second)
