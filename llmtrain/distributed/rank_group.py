"""Collectives on the device among some of a run's ranks."""

import torch.distributed as dist
from torch import Tensor


class RankGroup:
    """Some ranks that compute together: this one is ``rank`` of ``size``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.is_suspended = False  # True: this process computes alone for now

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace the contiguous ``tensor`` by its sum over the ranks; returns it."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Stack the ``tensor`` of every rank, which have one shape, along a new first dimension."""
        tensor = tensor.contiguous()
        result = tensor.new_empty((self.size, *tensor.shape))
        # the form that both gloo and NCCL have: results along the first dimension
        dist.all_gather_into_tensor(result.view(-1), tensor.view(-1), group=self.group)
        return result

    def scatter_sum(self, parts: Tensor) -> Tensor:
        """Sum ``parts`` ``(ranks, …)`` over the ranks; each receives the part with its number."""
        parts = parts.contiguous()
        result = parts.new_empty(parts.shape[1:])
        dist.reduce_scatter_tensor(result.view(-1), parts.view(-1), group=self.group)
        return result
