"""Output layer and cross-entropy as one operation that never holds all logits.

The logits of a step are its largest tensor by far: 8 GB in fp32 for 40 thousand tokens of GPT-2, and as much again
for their gradient.  Here they exist for one chunk of tokens at a time.  The gradient of a chunk needs only its logits,
so forward computes it at once and writes it over them, and no logits are computed twice: forward does the three matrix
products of the output layer, and backward only scales their results.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.base.constants import IGNORE
from llmtrain.base.device import device_type, has_no_data
from llmtrain.kernels.row_losses import Options, RowWork, VocabularyShare, exact_dtype, row_losses

CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # of a chunk's logits; more only takes memory
COMPILED_VOCABULARY = 4096  # with fewer classes the loss takes too small a part of a step to compile anything for it
# The gradient of the logits is written in their dtype, in fp16 times this, a power of two: without it all below 3e-8
# would be 0, and most classes of a large vocabulary have such probabilities.  Nothing overflows: the logits' gradient
# is about 1 at most, and its products are in fp32.  The loss scale comes later, and knows nothing of it.
FP16_FACTOR = 1024.0


@dataclass(frozen=True)
class Chunking:
    """The pieces that the loss is computed in."""

    tokens: int | None = None  # whose logits are computed at once; None: chosen by the device
    is_compiled: bool = False  # on a GPU, with a large vocabulary: the rows of a chunk in one kernel


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
    chunking: Chunking,
    share: VocabularyShare | None = None,
) -> Tensor:
    """Compute the **sum** of the cross-entropies of ``hidden @ weight.T``, fp32 (float64 for float64), 0-dimensional.

    ``hidden``: ``(tokens, hidden)``; ``weight``: ``(vocabulary, hidden)``; ``bias``: ``(vocabulary,)`` without
    gradient, added after the soft-cap, ``-inf`` for what is not to be predicted; ``targets``: ``(tokens,)``, -100 for
    those without a loss.  Logits are computed in autocast's dtype, the rest in fp32.

    ``options.z_loss`` changes the gradient only; the value is the cross-entropy without it.

    With a ``share``, ``weight`` and ``bias`` are the rows that this process holds; all processes of the share call this
    function with the same ``hidden`` and ``targets``, and get the same loss.
    """
    assert share is None or not torch.compiler.is_compiling()
    is_differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden, weight, bias, targets, options, chunking, dtype, is_differentiated, share
        )


def default_chunk(vocabulary: int, dtype: torch.dtype, device: str) -> int:
    """The number of tokens, a power of 2, whose logits fit into ``CHUNK_BYTES``."""
    fitting = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (dtype.itemsize * vocabulary)
    return 1 << max(fitting.bit_length() - 1, 4)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: Options,
        chunking: Chunking,
        dtype: torch.dtype,
        is_differentiated: bool,
        share: VocabularyShare | None,
    ) -> Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2] if is_differentiated else (False, False)
        if torch.compiler.is_compiling():
            total, hidden_grad, weight_grad = torch.ops.llmtrain.linear_cross_entropy(
                hidden, weight, bias, targets, options.softcap, options.z_loss, chunking.tokens, chunking.is_compiled,
                dtype, for_hidden, for_weight,
            )  # fmt: skip
        else:
            total, hidden_grad, weight_grad = sum_and_gradients(
                hidden, weight, bias, targets, options, chunking, dtype, for_hidden, for_weight, share
            )
        ctx.hidden_grad, ctx.weight_grad = hidden_grad if for_hidden else None, weight_grad if for_weight else None
        ctx.hidden_dtype, ctx.weight_dtype, ctx.factor = hidden.dtype, weight.dtype, gradient_factor(dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        ctx.hidden_grad = ctx.weight_grad = None
        if ctx.factor != 1.0:
            grad = grad / ctx.factor
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(grad).to(ctx.hidden_dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(grad.dtype).mul_(grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, *(None,) * 7


def gradient_factor(dtype: torch.dtype) -> float:
    """The power of two that the gradients of logits of ``dtype`` are multiplied by."""
    return FP16_FACTOR if dtype == torch.float16 else 1.0


def sum_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
    chunking: Chunking,
    dtype: torch.dtype,
    for_hidden: bool,
    for_weight: bool,
    share: VocabularyShare | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the loss, and its gradients times :func:`gradient_factor` where they are asked for."""
    exact, device = exact_dtype(dtype), device_type(hidden)
    low, low_weight = hidden.to(dtype), weight.to(dtype)
    is_large = share is None and len(weight) >= COMPILED_VOCABULARY
    is_compiled = chunking.is_compiled and device == "cuda" and is_large
    losses_of = row_losses if share is None else share.row_losses
    work = RowWork(
        options, for_hidden or for_weight, gradient_factor(dtype), device, is_compiled, is_traced=has_no_data(hidden)
    )
    # A bias within the product is one pass over memory less, except on a CPU, where it is one more.
    in_product = bias if options.softcap is None and device != "cpu" and not is_compiled else None
    later = bias if in_product is None else None
    is_target = targets != IGNORE
    # On a CPU rows of logits without a target have a gradient: a factor of 0 costs less here.
    low_targets = low * is_target[:, None] if for_weight and device == "cpu" else low
    hidden_grad = low.new_empty(low.shape, dtype=_hidden_grad_dtype(dtype, device)) if for_hidden else None
    weight_grad: Tensor | None = None
    total = torch.zeros((), dtype=exact, device=hidden.device)
    # the same for all processes of a share, which compute each chunk together
    chunk_tokens = chunking.tokens or default_chunk(len(weight) if share is None else share.largest, dtype, device)
    # One buffer for the logits of all chunks: malloc might not reuse the memory of a freed chunk for the next.
    buffer = torch.empty((min(chunk_tokens, len(low)), len(weight)), dtype=dtype, device=low.device)
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = _linear(low[chunk], low_weight, in_product, buffer[: len(low[chunk])])
        losses = losses_of(logits, later, targets[chunk], work)
        total += torch.where(is_target[chunk], losses, 0.0).sum()
        if hidden_grad is not None:
            _product(logits, low_weight, hidden_grad.dtype, device, out=hidden_grad[chunk])
        if start + chunk_tokens >= len(hidden):
            del low_weight  # memory of the step peaks here
        if for_weight:
            weight_grad = _plus_product(weight_grad, logits.t(), low_targets[chunk], exact, work)
    if hidden_grad is not None and device == "cpu":
        hidden_grad *= is_target[:, None]
    if hidden_grad is not None and share is not None:
        share.sum(hidden_grad)
    return total, hidden_grad, weight_grad


def _hidden_grad_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """fp32 where it costs nothing: on a GPU; and in fp16, which the factor could overflow."""
    return dtype if device == "cpu" and gradient_factor(dtype) == 1.0 else exact_dtype(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, device: str, out: Tensor | None = None) -> Tensor:
    """Compute ``left @ right`` in ``dtype``, the operands' own or one of more bits."""
    if dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if device != "cpu":
        return torch.mm(left, right, out_dtype=dtype, out=out)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, exact: torch.dtype, work: RowWork) -> Tensor:
    """Compute ``total + left @ right`` in ``exact``, in the place of ``total``; None: 0."""
    if left.dtype == torch.bfloat16 and work.device == "cpu":  # a product in bf16 is several times as fast as in fp32
        product = torch.mm(left, right)
        return product if total is None else total.to(exact).add_(product)
    if total is None:
        return _product(left, right, exact, work.device)
    if left.dtype == exact:
        return total.addmm_(left, right)
    if work.device == "cpu":
        return total.add_(_product(left, right, exact, work.device))
    if work.is_traced:  # the operation below takes no memory, and torch 2.11 cannot trace it
        return total
    return torch.addmm(total, left, right, out_dtype=exact, out=total)


# --- for torch ------------------------------------------------------------------------------------------------------
#
# One operation, where the whole unit is compiled: the compiler would compute the logits of several chunks at once, and
# would copy them instead of writing over them.

torch.library.define(
    "llmtrain::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float? softcap, float z_loss, int? chunk_tokens,"
    " bool is_compiled, ScalarType dtype, bool for_hidden, bool for_weight) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("llmtrain::linear_cross_entropy")
def _results(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    z_loss: float,
    chunk_tokens: int | None,
    is_compiled: bool,
    dtype: torch.dtype,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = exact_dtype(dtype)
    hidden_dtype = _hidden_grad_dtype(dtype, hidden.device.type)
    return (
        hidden.new_empty((), dtype=exact),
        hidden.new_empty(hidden.shape if for_hidden else (0,), dtype=hidden_dtype),
        hidden.new_empty(weight.shape if for_weight else (0,), dtype=exact),
    )


@torch.library.impl("llmtrain::linear_cross_entropy", ("cpu", "cuda"))
def _operation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    z_loss: float,
    chunk_tokens: int | None,
    is_compiled: bool,
    dtype: torch.dtype,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sum_and_gradients`; a gradient that is not asked for is empty."""
    chunking = Chunking(chunk_tokens, is_compiled=is_compiled)
    total, hidden_grad, weight_grad = sum_and_gradients(
        hidden, weight, bias, targets, Options(softcap, z_loss), chunking, dtype, for_hidden, for_weight
    )
    none = hidden.new_empty((0,), dtype=total.dtype)
    return (
        total,
        none.to(_hidden_grad_dtype(dtype, hidden.device.type)) if hidden_grad is None else hidden_grad,
        none.clone() if weight_grad is None else weight_grad.to(total.dtype),
    )
