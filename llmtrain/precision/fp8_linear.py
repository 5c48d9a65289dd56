"""Linear layers with 8-bit floating-point matrix products and dynamic scales.

A tensor is stored as ``q * scale``: ``q`` in e4m3 (4 bits of exponent, 3 of mantissa, up to 448) or e5m2 (5 and 2, up
to 57,344), ``scale`` in fp32, such that the largest magnitude becomes the largest number of the format (Micikevicius
et al. 2022, arXiv:2209.05433, with current instead of delayed scaling).  Names and arithmetic of the
recipes are torchao's:

* ``tensorwise``: one scale a tensor; inputs and weights in e4m3, gradients in e5m2.
* ``rowwise``: one scale a row, each operand quantised along the dimension that is summed over; everything in e4m3, the
  scales powers of two, so that a tensor and its transpose are rounded alike.

docs/decisions.md compares this with torchao.
"""

from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # the tensor cores need sizes that are multiples of this
MIN_AMAX = 1e-12  # the scale of a tensor of zeros is not 0


class Recipe(Enum):
    """Granularity of the scales."""

    tensorwise = "tensorwise"
    rowwise = "rowwise"


def find_scale(x: Tensor, dtype: torch.dtype, recipe: Recipe) -> Tensor:
    """Compute the scale of ``x`` ``(rows, columns)``, 0-dimensional or ``(rows, 1)``, fp32; no synchronisation."""
    largest = torch.finfo(dtype).max
    if recipe is Recipe.tensorwise:
        return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).clamp(min=MIN_AMAX) / largest
    amax = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    return torch.exp2(torch.ceil(torch.log2(amax.clamp(min=MIN_AMAX) / largest)))


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x / scale`` in ``dtype``, rows contiguous.  Non-finite numbers become NaN."""
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype).contiguous()  # the cast alone would overflow to NaN


def multiply(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    *,
    fast: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute ``a @ b.T + bias`` in ``dtype`` from quantised ``a`` ``(m, k)`` and ``b`` ``(n, k)``.

    ``fast`` sums with fewer bits on Hopper, which is enough for activations but not for gradients.
    """
    # kernels with row scales return only bf16, and those that return fp32 take no bias
    produced = torch.bfloat16 if scale_a.ndim else dtype
    fused = None if bias is None or produced == torch.float32 else bias.to(produced)
    out = torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), bias=fused, out_dtype=produced, use_fast_accum=fast
    ).to(dtype)
    return out if bias is None or fused is not None else out + bias.to(dtype)


class LinearFunction(torch.autograd.Function):
    """``x @ weight.T + bias``, with all three matrix products of forward and backward in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
        scale_x, scale_w = find_scale(x, E4M3, recipe), find_scale(weight, E4M3, recipe)
        x8 = quantise(x, scale_x, E4M3)
        ctx.recipe, ctx.dtype = recipe, x.dtype
        # with row scales the transpose has other scales; with one scale the 8-bit x, a byte a number, is enough
        ctx.save_for_backward(x8 if recipe is Recipe.tensorwise else x, scale_x, weight, scale_w)
        return multiply(x8, scale_x, quantise(weight, scale_w, E4M3), scale_w, x.dtype, fast=True, bias=bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (g,) = gradients
        x, scale_x, weight, scale_w = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if ctx.recipe is Recipe.tensorwise:
            scale_g = find_scale(g, E5M2, ctx.recipe)
            g8 = quantise(g, scale_g, E5M2)
            if needs_x:
                weight8 = quantise(weight.t(), scale_w, E4M3)
                grad_x = multiply(g8, scale_g, weight8, scale_w, ctx.dtype, fast=False)
            if needs_weight:
                grad_weight = multiply(
                    g8.t().contiguous(), scale_g, x.t().contiguous(), scale_x, weight.dtype, fast=False
                )
        else:
            if needs_x:
                grad_x = multiply(*_by_row(g), *_by_row(weight.t()), ctx.dtype, fast=False)
            if needs_weight:
                grad_weight = multiply(*_by_row(g.t()), *_by_row(x.t()), weight.dtype, fast=False)
        grad_bias = g.sum(0, dtype=torch.float32) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = find_scale(x, E4M3, Recipe.rowwise)
    return quantise(x, scale, E4M3), scale


class Fp8Linear(nn.Linear):
    """Layer that shares the fp32 parameters of ``linear`` and multiplies in 8 bits while gradients are recorded.

    Without gradients (evaluation, generation) it is an ordinary layer: the weights are evaluated as they are saved.
    """

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.recipe = recipe
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rows = x.reshape(-1, self.in_features).to(dtype)
        count = rows.shape[0]
        padding = -count % MULTIPLE  # the gradient of the weight sums over the rows
        if padding:
            rows = F.pad(rows, (0, 0, 0, padding))
        with torch.autocast(device, enabled=False):
            y = LinearFunction.apply(rows, self.weight, self.bias, self.recipe)
        return (y[:count] if padding else y).view(*x.shape[:-1], self.out_features)


def convert(blocks: nn.Module, recipe: Recipe) -> tuple[int, dict[str, str]]:
    """Replace the linear layers of ``blocks`` in place; names and parameters stay.

    Returns the number of replaced layers, and the names and sizes of the others.
    """
    converted, left = 0, {}
    for path, module in list(blocks.named_modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            if child.in_features % MULTIPLE or child.out_features % MULTIPLE:
                left[f"{path}.{name}".lstrip(".")] = f"{child.in_features} × {child.out_features}"
            else:
                setattr(module, name, Fp8Linear(child, recipe))
                converted += 1
    return converted, left
