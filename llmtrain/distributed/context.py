"""Context parallelism: ranks that share the positions of every sequence, for long ones.

Each rank has all weights and some positions of every sequence, so activations take a share of their memory.  Keys and
values are gathered over the ranks before attention, which reduces and scatters their gradients in backward; queries
stay (Llama Team 2024, https://arxiv.org/abs/2407.21783, section 3.3.2).  A sequence is cut into ``2 * ranks`` chunks,
and rank ``r`` has the chunks ``r`` and ``2 * ranks - 1 - r``: later queries see more keys, and so each rank has as many
pairs of a query and a key as any other.

Towards gradients the ranks are like ranks with different sequences: each has those of its positions, and they are
summed over all of them.  A call of the unit returns the sums of losses over whole sequences, the same on each rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.data import IGNORE, Batch
from llmtrain.distributed.rank_group import RankGroup
from llmtrain.distributed.tensor_group import sum_out
from llmtrain.model.layers.sequence_part import SequencePart
from llmtrain.objective import TrainingUnit

Losses = Callable[[Batch], dict[str, Tensor]]


class ChunkPair(SequencePart):
    """The two chunks of every sequence that a rank of ``ranks`` has."""

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self.whole_length = 0  # without the padding to a length that the ranks can share

    def stretches(self, length: int) -> Sequence[range]:
        chunk = length // 2
        return [range(number * chunk, (number + 1) * chunk) for number in own_chunks(self.ranks.rank, self.ranks.size)]

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        gathered: tuple[Tensor, Tensor] = _Gather.apply(key, value, self.ranks)
        return gathered

    def own(self, tensor: Tensor) -> Tensor:
        """The part of ``tensor`` ``(batch, positions)``, whose length is a multiple of twice the number of ranks."""
        chunks = tensor.chunk(2 * self.ranks.size, dim=1)
        return torch.cat([chunks[number] for number in own_chunks(self.ranks.rank, self.ranks.size)], dim=1)


def own_chunks(rank: int, ranks: int) -> tuple[int, int]:
    """The numbers of the two of ``2 * ranks`` chunks that a rank has."""
    return rank, 2 * ranks - 1 - rank


class SharedPositions:
    """A training unit whose calls compute this rank's positions of a batch that all ``ranks`` have.

    The unit is changed in place: its calls take whole sequences, as before.  Raises ValueError for a model that cannot
    compute some positions alone.
    """

    def __init__(self, unit: TrainingUnit, ranks: RankGroup) -> None:
        if not unit.model.takes_part:
            raise ValueError(
                f"distributed.context={ranks.size}: {type(unit.model).__name__} does not compute some positions of a "
                "sequence alone, GPT and Llama do; take distributed=fsdp"
            )
        self.unit = unit
        self.ranks = ranks
        self.part = ChunkPair(ranks)
        unit.model.part = self.part
        unit.forward = self._sum_over_ranks(unit.forward)  # type: ignore[assignment, method-assign]
        unit.sequence_losses = self._sum_over_ranks(unit.sequence_losses)  # type: ignore[assignment, method-assign]

    def split(self, batch: Batch) -> Batch:
        """This rank's positions of ``batch``; the segments stay those of whole sequences.

        Rows whose length is no multiple of ``2 * ranks`` are padded on the right.
        """
        tensors = {}
        self.part.whole_length = batch.tensors["inputs"].shape[1]
        for name, tensor in batch.tensors.items():
            missing = -tensor.shape[1] % (2 * self.ranks.size)
            padded = F.pad(tensor, (0, missing), value=IGNORE if name == "targets" else 0) if missing else tensor
            tensors[name] = padded if name == "segments" else self.part.own(padded)
        return replace(batch, tensors=tensors, lengths={})

    def _sum_over_ranks(self, losses: Losses) -> Losses:
        """``losses`` of whole sequences, made of those of this rank's positions."""

        def whole_losses(batch: Batch) -> dict[str, Tensor]:
            if self.ranks.is_suspended:
                return losses(batch)
            own = losses(self.split(batch))
            total = sum_out(torch.stack(list(own.values())), self.ranks)
            return dict(zip(own, total.unbind(), strict=True))

        return whole_losses

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context in which every rank can call the unit alone, on all positions."""
        self.unit.model.part, self.ranks.is_suspended = None, True
        try:
            yield
        finally:
            self.unit.model.part, self.ranks.is_suspended = self.part, False


class _Gather(torch.autograd.Function):
    """Keys and values ``(batch, heads, positions, head_size)`` of all ranks, in the order of whole sequences."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, ranks: RankGroup) -> tuple[Tensor, Tensor]:
        ctx.ranks = ranks
        halves = ranks.gather(torch.stack((key, value))).unflatten(-2, (2, -1))
        firsts, seconds = halves.select(-3, 0), halves.select(-3, 1)  # (ranks, 2, batch, heads, chunk, head_size)
        chunks = [*firsts.unbind(), *reversed(seconds.unbind())]
        whole_key, whole_value = (torch.cat([each[which] for each in chunks], dim=-2) for which in (0, 1))
        return whole_key, whole_value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        ranks: RankGroup = ctx.ranks
        chunks = [gradient.chunk(2 * ranks.size, dim=-2) for gradient in gradients]  # of keys, and of values
        order = [number for rank in range(ranks.size) for number in own_chunks(rank, ranks.size)]
        parts = torch.stack([of_one[number] for number in order for of_one in chunks])
        own = ranks.scatter_sum(parts.unflatten(0, (ranks.size, 2, 2)))  # (2 chunks, 2, batch, heads, chunk, head_size)
        key, value = torch.cat(own.unbind(), dim=-2).unbind()
        return key, value, None
