"""Clipping of each gradient element."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmtrain.base.checks import positive
from llmtrain.clipping.base import Gradients, MeasuredClipping


@dataclass(frozen=True)
class ValueClipping(MeasuredClipping):
    """A limit on every gradient element, to ``[-max_value, max_value]``."""

    takes_shards: ClassVar[bool] = True

    max_value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(max_value=self.max_value)

    def clip(self, gradients: Gradients) -> tuple[Tensor, None]:
        clipped = gradients.largest > self.max_value
        torch._foreach_clamp_min_(gradients.tensors, -self.max_value)
        torch._foreach_clamp_max_(gradients.tensors, self.max_value)
        return clipped, None
