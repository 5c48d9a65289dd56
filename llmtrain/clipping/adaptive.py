"""Adaptive gradient clipping (Brock et al. 2021, https://arxiv.org/abs/2102.06171)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.base.checks import pattern, pattern_matches, positive
from llmtrain.clipping.base import Gradients, MeasuredClipping


@dataclass(frozen=True)
class AdaptiveClipping(MeasuredClipping):
    """A limit on the norm of each unit's gradient: ``clip_factor`` times the norm of the unit's weights.

    For each unit i: ``G_i *= limit / |G_i|`` where ``|G_i| > limit = clip_factor * max(|W_i|, eps)``.  A unit is a
    row of a matrix (the weights of one output), or a whole vector or scalar.  Parameters that match a pattern of
    ``exclude`` (``re.search``) are not clipped; the paper leaves out the output layer.
    """

    clip_factor: float
    eps: float
    exclude: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(clip_factor=self.clip_factor, eps=self.eps)
        for i, value in enumerate(self.exclude):
            pattern(f"exclude[{i}]", value)

    def check_parameters(self, names: Sequence[str]) -> None:
        for i, value in enumerate(self.exclude):
            pattern_matches(f"exclude[{i}]", value, names)

    def clip(self, gradients: Gradients) -> Tensor:
        clipped = torch.zeros_like(gradients.norm, dtype=torch.bool)
        for name, weight, gradient in zip(gradients.names, gradients.parameters, gradients.tensors, strict=True):
            if any(re.search(value, name) for value in self.exclude):
                continue
            limits = self.clip_factor * unit_norms(weight).clamp(min=self.eps)
            coefficients = (limits / unit_norms(gradient)).clamp(max=1.0)  # a gradient of 0 gives inf, so 1
            gradient.mul_(coefficients)
            clipped |= (coefficients < 1).any()
        return clipped


def unit_norms(tensor: Tensor) -> Tensor:
    """L2 norm of each output unit: ``(rows, 1, …)`` of a tensor ``(rows, …)``, 0-dimensional of a vector or scalar."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.dim() < 2:
        return torch.linalg.vector_norm(tensor, dtype=dtype)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True, dtype=dtype)
