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

CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # of a chunk's logits; more only takes memory
ROWS_BYTES = 1 << 23  # of fp32 logits that a CPU works on at once: what its second-level cache about holds


@dataclass(frozen=True)
class Options:
    """Additions to the plain cross-entropy."""

    softcap: float | None = None  # logits are cap * tanh(logits / cap)
    z_loss: float = 0.0  # weight of the squared log of the softmax denominator: PaLM, section 5


@dataclass(frozen=True)
class Chunking:
    """The size of the pieces that the loss is computed in."""

    tokens: int | None = None  # whose logits are computed at once; None: chosen by the device
    planned_for: str | None = None  # for tracing without data: cut as on this type of device, wherever the tensors are


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options, chunking: Chunking
) -> Tensor:
    """Compute the **sum** of the cross-entropies of ``hidden @ weight.T``, fp32 (float64 for float64), 0-dimensional.

    ``hidden``: ``(tokens, hidden)``; ``weight``: ``(vocabulary, hidden)``; ``bias``: ``(vocabulary,)`` without
    gradient, added after the soft-cap, ``-inf`` for what is not to be predicted; ``targets``: ``(tokens,)``, -100 for
    those without a loss.  Logits are computed in autocast's dtype, the rest in fp32.

    ``options.z_loss`` changes the gradient only; the value is the cross-entropy without it.
    """
    is_differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunk_tokens = chunking.tokens or default_chunk(weight.shape[0], dtype, chunking.planned_for or device)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden, weight, bias, targets, options, chunk_tokens, chunking.planned_for, dtype, is_differentiated
        )


def default_chunk(vocabulary: int, dtype: torch.dtype, device: str) -> int:
    """The number of tokens, a power of 2, whose logits fit into ``CHUNK_BYTES``.

    A GPU also holds the chunk in fp32; a CPU converts it in smaller parts.
    """
    itemsize = dtype.itemsize if device == "cpu" else dtype.itemsize + 4
    fitting = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (itemsize * vocabulary)
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
        chunk_tokens: int,
        planned_for: str | None,
        dtype: torch.dtype,
        is_differentiated: bool,
    ) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)  # float64 only for float64
        low, low_weight = hidden.to(dtype), weight.to(dtype)
        for_hidden, for_weight = ctx.needs_input_grad[:2] if is_differentiated else (False, False)
        is_target = targets != IGNORE
        classes = torch.where(is_target, targets, 0)[:, None]
        # A token without a loss adds nothing to the gradients: a factor of 0 costs less here than on the logits.
        low_targets = low * is_target[:, None] if for_weight else low
        hidden_grad = torch.empty_like(low) if for_hidden else None
        weight_grad: Tensor | None = None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        # One buffer for the logits of all chunks: malloc might not reuse the memory of a freed chunk for the next.
        buffer = torch.empty((min(chunk_tokens, len(low)), len(weight)), dtype=dtype, device=low.device)
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            # On a CPU addmm would first fill all logits with the bias, which is one more pass over memory.
            in_product = bias if options.softcap is None and hidden.is_cuda else None
            later = bias if in_product is None else None
            logits = _linear(low[chunk], low_weight, in_product, buffer[: len(low[chunk])])
            differentiate = for_hidden or for_weight
            losses = _losses(logits, later, classes[chunk], options, exact, planned_for, differentiate=differentiate)
            total += torch.where(is_target[chunk], losses, 0.0).sum()
            if hidden_grad is not None:
                torch.mm(logits, low_weight, out=hidden_grad[chunk])
            if start + chunk_tokens >= len(hidden):
                del low_weight  # memory of the step peaks here
            if for_weight:
                weight_grad = _plus_product(weight_grad, logits.t(), low_targets[chunk], exact)
        if hidden_grad is not None:
            hidden_grad *= is_target[:, None]
        ctx.hidden_grad, ctx.weight_grad = hidden_grad, weight_grad
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        ctx.hidden_grad = ctx.weight_grad = None
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * grad).to(ctx.hidden_dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(grad.dtype).mul_(grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None, None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, exact: torch.dtype) -> Tensor:
    """Compute ``total + left @ right`` in ``exact``; with ``total`` None the product may keep its dtype."""
    if left.dtype == exact:
        return torch.mm(left, right) if total is None else total.addmm_(left, right)
    if left.is_cuda:
        if total is None:
            return torch.mm(left, right, out_dtype=exact)
        return torch.addmm(total, left, right, out_dtype=exact)
    product = torch.mm(left, right)
    return product if total is None else total.to(exact).add_(product)


def _losses(
    logits: Tensor,
    bias: Tensor | None,
    classes: Tensor,
    options: Options,
    exact: torch.dtype,
    planned_for: str | None,
    *,
    differentiate: bool,
) -> Tensor:
    """The cross-entropy of each row of ``logits``, whose place the gradient takes if ``differentiate``.

    Traced for a plan, only the first of the blocks of rows is computed: the others come and go in the same way.
    """
    rows = len(logits)
    if (planned_for or logits.device.type) == "cpu":
        rows = max(ROWS_BYTES // (exact.itemsize * logits.shape[1]), 1)
    parts = list(zip(logits.split(rows), classes.split(rows), strict=True))
    done = parts if planned_for is None else parts[:1]
    losses = [_losses_of_rows(*part, bias, options, exact, differentiate) for part in done]
    losses += [torch.empty(len(part), dtype=exact, device=part.device) for part, _ in parts[len(done) :]]
    return torch.cat(losses)


def _losses_of_rows(
    raw: Tensor, classes: Tensor, bias: Tensor | None, options: Options, exact: torch.dtype, differentiate: bool
) -> Tensor:
    logits, slope = raw, None
    if options.softcap is not None:
        saturation = torch.tanh(raw.to(exact) / options.softcap)
        logits, slope = options.softcap * saturation, 1 - saturation.square()
    if bias is not None:
        logits += bias
    log_probabilities = torch.log_softmax(logits, -1, dtype=exact)
    of_target = log_probabilities.gather(1, classes)
    if differentiate:
        log_sum = logits.gather(1, classes) - of_target
        gradient = log_probabilities.exp_()
        if options.z_loss:
            gradient *= 1 + 2 * options.z_loss * log_sum
        gradient.scatter_(1, classes, gradient.gather(1, classes) - 1)
        if slope is not None:
            gradient *= slope
        raw.copy_(gradient)
    return -of_target[:, 0]
