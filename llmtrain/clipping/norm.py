"""Clipping by the global norm (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmtrain.base.checks import positive
from llmtrain.base.device import device_type
from llmtrain.clipping.base import Gradients, MeasuredClipping


@dataclass(frozen=True)
class NormClipping(MeasuredClipping):
    """All gradients scaled by ``max_norm / norm`` if their global L2 norm exceeds ``max_norm``."""

    takes_shards: ClassVar[bool] = True

    max_norm: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(max_norm=self.max_norm)

    def clip(self, gradients: Gradients) -> tuple[Tensor, Tensor | None]:
        exceeds = gradients.norm > self.max_norm
        if device_type(exceeds) != "cpu":
            # The update divides while it reads the gradients, which saves a pass over them.  A divisor of exactly 1
            # changes no bit, and the host need not wait to learn which divisor it is.
            return exceeds, self.divisor(gradients.norm)
        if exceeds:
            torch._foreach_mul_(gradients.tensors, self.max_norm / gradients.norm)
        return exceeds, None

    def divisor(self, norm: Tensor) -> Tensor:
        """The number, at least 1, that brings gradients of the norm ``norm`` to the limit, fp32."""
        return (norm / self.max_norm).clamp(min=1.0).float()
