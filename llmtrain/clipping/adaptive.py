"""Adaptive gradient clipping (Brock et al. 2021, https://arxiv.org/abs/2102.06171)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.base.checks import pattern, pattern_matches, positive
from llmtrain.clipping.base import Gradients, MeasuredClipping, at_least_fp32


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

    def clip(self, gradients: Gradients) -> tuple[Tensor, None]:
        weights, tensors = [], []
        for name, weight, gradient in zip(gradients.names, gradients.parameters, gradients.tensors, strict=True):
            if not any(re.search(value, name) for value in self.exclude):
                weights.append(weight)
                tensors.append(gradient)
        if not tensors:
            return torch.zeros_like(gradients.norm, dtype=torch.bool), None
        # The units of all tensors in one vector: a few kernels, and not a few for each tensor.
        limits = self.clip_factor * unit_norms(weights).clamp(min=self.eps)
        coefficients = (limits / unit_norms(tensors)).clamp(max=1.0)  # a gradient of 0 gives inf, so 1
        sizes = [len(tensor) if tensor.dim() > 1 else 1 for tensor in tensors]
        for gradient, of_units in zip(tensors, coefficients.split(sizes), strict=True):
            gradient.mul_(of_units.view(-1, *[1] * (gradient.dim() - 1)) if gradient.dim() > 1 else of_units.view(()))
        return (coefficients < 1).any(), None


def unit_norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms of the output units of all ``tensors``, one after another: a norm a row, one of a vector or scalar."""
    dtype = at_least_fp32(*tensors)
    vectors = [tensor for tensor in tensors if tensor.dim() < 2]
    of_vectors = iter(torch._foreach_norm(vectors, 2, dtype=dtype) if vectors else ())
    return torch.cat(
        [
            torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), dtype=dtype)
            if tensor.dim() > 1
            else next(of_vectors).view(1)
            for tensor in tensors
        ]
    )
