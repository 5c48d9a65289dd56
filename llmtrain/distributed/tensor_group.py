"""Tensors that the ranks of a tensor group pass between layers whose work they share (Shoeybi et al. 2019).

Outside of those layers every rank computes the same: tensors there, and their gradients, are equal on all ranks.
Within them a rank computes with its heads, channels or rows alone.  Each function below is one change between the two,
with the opposite change in backward (https://arxiv.org/abs/1909.08053, section 3).  Sequence parallelism lets a rank
compute norms and dropout of some positions alone (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198).

Sums over the ranks have the same bits on each of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llmtrain.distributed.rank_group import RankGroup


class TensorGroup(RankGroup):
    """The ranks that share the work of every layer; suspended, a process has the whole unit."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.length = 0  # of the sequences that are split over the ranks now, see :func:`split_sequence`


def copy_in(x: Tensor, ranks: TensorGroup) -> Tensor:
    """Return ``x``, equal on all ranks, for layers whose work is shared: its gradients are summed over the ranks."""
    return x if ranks.is_suspended else _CopyIn.apply(x, ranks)


def sum_out(x: Tensor, ranks: RankGroup) -> Tensor:
    """Return the sum of the ranks' ``x``, equal on all of them."""
    return x if ranks.is_suspended else _SumOut.apply(x, ranks)


def split_sequence(x: Tensor, ranks: TensorGroup) -> Tensor:
    """Return this rank's positions of ``x`` ``(batch, sequence, hidden)``, which is equal on all ranks.

    Sequences that the ranks cannot share evenly are padded on the right; :func:`gather_sequence` and
    :func:`join_sequence` leave the padding out again.
    """
    ranks.length = x.shape[1]
    return x if ranks.is_suspended else _Split.apply(x, ranks)


def join_sequence(x: Tensor, ranks: TensorGroup) -> Tensor:
    """Return all positions, equal on all ranks: the opposite of :func:`split_sequence`."""
    return x if ranks.is_suspended else _Join.apply(x, ranks, ranks.length)


def gather_sequence(x: Tensor, ranks: TensorGroup) -> Tensor:
    """Return all positions for layers whose work is shared: their gradients are summed over the ranks."""
    return x if ranks.is_suspended else _Gather.apply(x, ranks, ranks.length)


def sum_to_split(x: Tensor, ranks: TensorGroup) -> Tensor:
    """Return this rank's positions of the sum of the ranks' ``x`` ``(batch, sequence, hidden)``."""
    return x if ranks.is_suspended else _SumToSplit.apply(x, ranks)


def join_channels(x: Tensor, ranks: TensorGroup, sizes: Sequence[int]) -> Tensor:
    """Return the channels of all ranks, in order; ``sizes``: their numbers of channels, the last dimension of ``x``."""
    return x if ranks.is_suspended else _JoinChannels.apply(x, ranks, tuple(sizes))


def _own_positions(x: Tensor, ranks: TensorGroup) -> Tensor:
    return _by_rank(x, ranks)[ranks.rank].contiguous()


def _by_rank(x: Tensor, ranks: TensorGroup) -> Tensor:
    """The positions of each rank: ``(batch, sequence, …)`` to ``(ranks, batch, positions, …)``, padded."""
    batch, length = x.shape[:2]
    each = -(-length // ranks.size)
    if each * ranks.size > length:
        x = F.pad(x, (0, 0, 0, each * ranks.size - length))
    return x.reshape(batch, ranks.size, each, x.shape[2]).transpose(0, 1)


def _all_positions(x: Tensor, ranks: TensorGroup, length: int) -> Tensor:
    """Gather the ranks' positions of a sequence of ``length`` tokens."""
    return ranks.gather(x).transpose(0, 1).flatten(1, 2)[:, :length]


# A gradient may also belong to another consumer, so that none is changed in place.


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorGroup) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradients[0].clone(memory_format=torch.contiguous_format)), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: RankGroup) -> Tensor:
        return ranks.sum(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorGroup) -> Tensor:
        ctx.ranks, ctx.length = ranks, x.shape[1]
        return _own_positions(x, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_positions(gradients[0], ctx.ranks, ctx.length), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorGroup, length: int) -> Tensor:
        ctx.ranks = ranks
        return _all_positions(x, ranks, length)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _own_positions(gradients[0], ctx.ranks), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorGroup, length: int) -> Tensor:
        ctx.ranks = ranks
        return _all_positions(x, ranks, length)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.scatter_sum(_by_rank(gradients[0], ctx.ranks)), None, None


class _SumToSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorGroup) -> Tensor:
        ctx.ranks, ctx.length = ranks, x.shape[1]
        return ranks.scatter_sum(_by_rank(x, ranks))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_positions(gradients[0], ctx.ranks, ctx.length), None


class _JoinChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorGroup, sizes: tuple[int, ...]) -> Tensor:
        begin = sum(sizes[: ranks.rank])
        ctx.own = slice(begin, begin + sizes[ranks.rank])
        gathered = ranks.gather(F.pad(x, (0, max(sizes) - x.shape[-1])))
        return torch.cat([part[..., :size] for part, size in zip(gathered, sizes, strict=True)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][..., ctx.own], None, None
