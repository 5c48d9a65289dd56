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

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

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


class Weight8(NamedTuple):
    """A weight ``(outputs, inputs)`` as the operands of the two products that read it, and their scales."""

    forward: Tensor  # (outputs, inputs)
    forward_scale: Tensor
    backward: Tensor  # (inputs, outputs)
    backward_scale: Tensor


def quantise_weight(weight: Tensor, recipe: Recipe) -> Weight8:
    """Quantise ``weight`` for forward and backward; with one scale a tensor the second is a view of the first."""
    scale = find_scale(weight, E4M3, recipe)
    numbers = quantise(weight, scale, E4M3)
    if recipe is Recipe.tensorwise:
        return Weight8(numbers, scale, numbers.t(), scale.clone())  # torch's compiler takes no tensor twice
    return Weight8(numbers, scale, *_by_row(weight.t()))


def quantise_into(low: Weight8, weight: Tensor, recipe: Recipe) -> None:
    """Quantise ``weight`` into the memory of ``low``."""
    for tensor, value in zip(low, quantise_weight(weight, recipe), strict=True):
        tensor.copy_(value)


class LinearFunction(torch.autograd.Function):
    """``x @ weight.T + bias``, with all three matrix products of forward and backward in 8 bits.

    ``weight`` is read as ``low``; its own values are not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, *low: Tensor) -> Tensor:
        w = Weight8(*low)
        scale_x = find_scale(x, E4M3, recipe)
        x8 = quantise(x, scale_x, E4M3)
        ctx.recipe, ctx.dtype, ctx.weight_dtype = recipe, x.dtype, weight.dtype
        # with row scales the transpose has other scales; with one scale the 8-bit x, a byte a number, is enough
        ctx.save_for_backward(x8 if recipe is Recipe.tensorwise else x, scale_x, w.backward, w.backward_scale)
        return multiply(x8, scale_x, w.forward, w.forward_scale, x.dtype, fast=True, bias=bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, scale_x, w, scale_w = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = None
        if ctx.recipe is Recipe.tensorwise:
            scale_g = find_scale(g, E5M2, ctx.recipe)
            g8 = quantise(g, scale_g, E5M2)
            if needs_x:
                grad_x = multiply(g8, scale_g, w, scale_w, ctx.dtype, fast=False)
            if needs_weight:
                grad_weight = multiply(
                    g8.t().contiguous(), scale_g, x.t().contiguous(), scale_x, ctx.weight_dtype, fast=False
                )
        else:
            if needs_x:
                grad_x = multiply(*_by_row(g), w, scale_w, ctx.dtype, fast=False)
            if needs_weight:
                grad_weight = multiply(*_by_row(g.t()), *_by_row(x.t()), ctx.weight_dtype, fast=False)
        grad_bias = g.sum(0, dtype=torch.float32) if needs_bias else None
        return grad_x, grad_weight, grad_bias, *(None,) * (1 + len(Weight8._fields))


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = find_scale(x, E4M3, Recipe.rowwise)
    return quantise(x, scale, E4M3), scale


class Fp8Linear(nn.Linear):
    """Layer that shares the fp32 parameters of ``linear`` and multiplies in 8 bits while gradients are recorded.

    Without gradients (evaluation, generation) it is an ordinary layer: the weights are evaluated as they are saved.
    The weight is quantised for every product, or with :attr:`is_held` only when :meth:`hold` is called.
    """

    weight8_forward: Tensor
    weight8_forward_scale: Tensor
    weight8_backward: Tensor
    weight8_backward_scale: Tensor

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.recipe = recipe
        self.is_held = False
        # always in the same memory, which a CUDA graph reads; no part of checkpoints
        for name, rows, columns in ("forward", *self.weight.shape), ("backward", *self.weight.shape[::-1]):
            shape = () if recipe is Recipe.tensorwise else (rows, 1)
            low = torch.empty(rows, columns, dtype=E4M3, device=self.weight.device)
            self.register_buffer(f"weight8_{name}", low, persistent=False)
            scale = torch.empty(shape, dtype=torch.float32, device=self.weight.device)
            self.register_buffer(f"weight8_{name}_scale", scale, persistent=False)
        self.train(linear.training)

    @property
    def weight8(self) -> Weight8:
        """The weight as :meth:`hold` has quantised it."""
        return Weight8(
            self.weight8_forward, self.weight8_forward_scale, self.weight8_backward, self.weight8_backward_scale
        )

    @torch.no_grad()
    def hold(self, quantise_into: Callable[[Weight8, Tensor, Recipe], None] = quantise_into) -> None:
        """Quantise the weight for all products until :attr:`is_held` is False; it must not change before."""
        quantise_into(self.weight8, self.weight, self.recipe)
        self.is_held = True

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
            low = self.weight8 if self.is_held else self._quantised()
            y = LinearFunction.apply(rows, self.weight, self.bias, self.recipe, *low)
        return (y[:count] if padding else y).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def _quantised(self) -> Weight8:
        return Weight8(*(tensor.contiguous() for tensor in quantise_weight(self.weight, self.recipe)))


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
