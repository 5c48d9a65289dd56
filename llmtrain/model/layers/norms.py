"""Norms of the residual stream, in fp32 or in autocast's dtype, and the cast of their results for several products."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of matrix products with ``x``; None without autocast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, with ``is_low`` in autocast's dtype: statistics in fp32 inside, weights rounded."""

    is_low = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the shape of ``x``."""
        low = autocast_dtype(x) if self.is_low else None
        if low is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # it would convert everything to fp32 on a GPU
            weight, bias = self.weight.to(low), self.bias.to(low)  # the kernel takes no other types on a GPU
            return F.layer_norm(x.to(low), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, in fp32 at least (Zhang & Sennrich 2019).

    With ``is_low`` it reads and writes autocast's dtype, with the weight rounded to it and the mean in fp32.
    """

    is_low = False

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the shape of ``x``."""
        low = autocast_dtype(x) if self.is_low else None
        if low is not None:
            with torch.autocast(x.device.type, enabled=False):
                return F.rms_norm(x.to(low), self.weight.shape, self.weight.to(low), self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


def lower_norms(modules: Iterable[nn.Module]) -> None:
    """Make the norms among ``modules`` compute in autocast's dtype."""
    for module in modules:
        if isinstance(module, LayerNorm | RMSNorm):
            module.is_low = True


def share(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return ``x`` for ``count`` matrix products, cast once to autocast's dtype where each would cast it.

    Values and gradients are those of ``count`` casts to the bit: gradients are added up in the dtype of ``x``.
    """
    low = autocast_dtype(x)
    if low is None or x.dtype != torch.float32 or torch.compiler.is_compiling():  # the compiler joins casts itself
        return (x,) * count
    if not (torch.is_grad_enabled() and x.requires_grad):
        return (x.to(low),) * count
    return _Shared.apply(x, low, count)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: torch.dtype, count: int) -> tuple[Tensor, ...]:
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        cast = x.to(low)
        return tuple(cast.view_as(cast) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        # autograd adds up in the reverse order of use
        present = [gradient for gradient in reversed(gradients) if gradient is not None]
        if not present:
            return None, None, None
        total = present[0].to(ctx.dtype)
        for gradient in present[1:]:
            total += gradient
        return total, None, None
