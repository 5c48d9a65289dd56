"""The embedding of tokens and positions, with a fast gradient on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Embedding(nn.Embedding):
    """torch's embedding, looked up by :func:`look_up`."""

    def forward(self, input: Tensor) -> Tensor:
        return look_up(input, self.weight)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows ``ids`` of ``weight``; on a CPU the gradient, the same to the bit in fp32, takes a tenth of the time.

    torch's kernel does some operations on small tensors for every token: 170 ms for 2,048 tokens of GPT-2, 6% of a
    step in bf16 on two cores.
    """
    if weight.device.type == "cpu" and weight.requires_grad and torch.is_grad_enabled():
        return _Rows.apply(weight, ids)
    return F.embedding(ids, weight)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        rows = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        return rows.index_add_(0, ids.flatten(), grad.flatten(0, -2)), None
