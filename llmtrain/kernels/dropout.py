"""Dropout (Srivastava et al. 2014) with fast random numbers on a CPU.

On a CPU torch calls its generator once for every element, on one core, which made a step with dropout a third longer.
Here one 64-bit random number decides four elements, 16 bits each.  Attention with dropout, which has no fused kernel
on a CPU, is computed step by step.  On other devices and in compiled code dropout is torch's own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.base.device import device_type

LEVELS = 1 << 16  # values of 16 bits: a rate is a multiple of 1 / LEVELS


class Dropout(nn.Module):
    """Dropout: in training, zero elements with probability ``rate`` and scale up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` (any shape); the result has its shape."""
        if not self.training or not self.rate:
            return x
        if not is_drawn_here(x):
            return F.dropout(x, self.rate)
        kept, scale = draw_kept(x.shape, self.rate)
        return x * kept.to(x.dtype).mul_(scale)

    def extra_repr(self) -> str:
        return f"{self.rate:g}"


def is_drawn_here(x: Tensor) -> bool:
    """Return whether :func:`draw_kept`, and not torch's kernels, draws the random numbers for ``x``."""
    return device_type(x) == "cpu" and not torch.compiler.is_compiling()


def draw_kept(shape: torch.Size, rate: float) -> tuple[Tensor, float]:
    """Draw the elements to keep, a boolean mask of ``shape`` on the CPU, and the factor to multiply them by.

    The numbers come from torch's default generator.  ``rate`` is rounded to a multiple of 1 / 65536, and the factor
    follows from the rounded rate.
    """
    count = shape.numel()
    dropped = min(max(round(rate * LEVELS), 1), LEVELS - 1)  # levels that drop
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device="cpu").random_(-(1 << 63), None)
    kept = bits.view(torch.int16)[:count] >= dropped - LEVELS // 2
    return kept.view(shape), LEVELS / (LEVELS - dropped)


def attend_with_dropout(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Attention of ``query`` ``(batch, heads, new, head_size)`` on a CPU, with a share ``rate`` of its weights dropped.

    ``key`` and ``value``: ``(batch, heads, seen, head_size)``.  ``mask``: boolean, or added to the scores; None: all
    keys up to the query's own.  In bf16 the softmax computes in fp32, but reads scores and gives weights that are
    rounded to bf16: the relative error is some 1.5 to 5 times that of torch's fused kernel.
    """
    new, seen, size = query.shape[2], key.shape[2], query.shape[3]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):  # autocast would make the softmax read and write fp32
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if mask is None:
            mask = torch.full((new, seen), -torch.inf, dtype=dtype, device="cpu").triu_(seen - new + 1)
        elif mask.dtype == torch.bool:
            mask = torch.zeros((), dtype=dtype, device="cpu").masked_fill(~mask, -torch.inf)
        scores = (query * (1 / math.sqrt(size))) @ key.transpose(-2, -1)
        weights = scores.add_(mask.to(dtype)).softmax(-1)
        kept, scale = draw_kept(weights.shape, rate)
        return (weights * kept) @ (value * scale)
