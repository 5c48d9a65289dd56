"""The ranks of one pipeline, and what they send to one another."""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

MAX_SENDS = 2  # of evaluations under way: a rank does not run further ahead of the next one


class PipelineGroup:
    """The ranks that each hold some stages of a unit, on the same sequences; methods are collectives of the group.

    Nothing here makes the host wait for the device, except :meth:`share_shape`.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = group.rank(), group.size()
        self._sends: deque[tuple[dist.Work | None, Tensor]] = deque()
        self.sum(torch.zeros((), device=device))  # connects all: NCCL would wait for the ranks that send nothing

    @property
    def last(self) -> int:
        """The rank of the last stage."""
        return self.size - 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks; returns it."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, value: Tensor) -> Tensor:
        """The largest ``value``, 0-dimensional; NaN if one of them is, which the maximum of some libraries loses."""
        values = value.new_zeros(self.size)
        values[self.rank] = value
        return self.sum(values).amax()

    def add_between_ends(self, tensors: list[Tensor]) -> None:
        """Add to ``tensors`` of the first rank those of the last, and the reverse: the same bits on both.

        The others do nothing.
        """
        if self.rank not in (0, self.last):
            return
        peer = self.last - self.rank
        received = [torch.empty_like(tensor) for tensor in tensors]
        operations = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for tensor in received]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        torch._foreach_add_(tensors, received)

    # --- evaluations ------------------------------------------------------------------------------------------------

    def send(self, tensor: Tensor, to: int) -> None:
        """Send ``tensor`` to the rank ``to``; it is kept until it has arrived."""
        while len(self._sends) >= MAX_SENDS:
            self._wait_for_send()
        tensor = tensor.contiguous()
        self._sends.append((dist.isend(tensor, group=self.group, group_dst=to), tensor))

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fill ``tensor`` with what the rank ``source`` sends; returns it."""
        dist.recv(tensor, group=self.group, group_src=source)
        return tensor

    def finish_sends(self) -> None:
        """Wait until everything has arrived."""
        while self._sends:
            self._wait_for_send()

    def _wait_for_send(self) -> None:
        work, _ = self._sends.popleft()
        if work is not None:
            work.wait()

    def share_last(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by that of the last rank; returns it."""
        dist.broadcast(tensor, group=self.group, group_src=self.last)
        return tensor

    def share_shape(self, shape: torch.Size | None) -> torch.Size | None:
        """The ``shape`` of the last rank, of at most 3 dimensions; None where it has none."""
        numbers = [-1] if shape is None else [len(shape), *shape]
        found = torch.tensor([*numbers, *[0] * (4 - len(numbers))], device=self.device)
        dimensions, *sizes = self.share_last(found).tolist()
        return None if dimensions < 0 else torch.Size(sizes[:dimensions])
