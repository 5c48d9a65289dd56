"""Clipping by the global norm (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.base.checks import positive
from llmtrain.clipping.base import Gradients, MeasuredClipping


@dataclass(frozen=True)
class NormClipping(MeasuredClipping):
    """All gradients times ``max_norm / norm`` where the L2 norm of all of them together exceeds ``max_norm``."""

    max_norm: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(max_norm=self.max_norm)

    def clip(self, gradients: Gradients) -> Tensor:
        exceeds = gradients.norm > self.max_norm
        if exceeds.device.type == "cpu" and not exceeds:  # a pass over all gradients less
            return exceeds
        # times exactly 1 otherwise, which changes no bit and saves asking the device which of the two it is
        coefficient = torch.where(exceeds, self.max_norm / gradients.norm, 1.0)
        torch._foreach_mul_(gradients.tensors, coefficient)
        return exceeds
