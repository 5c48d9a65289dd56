"""The division of parameters over the ranks of a tensor group, in place, and the boxes that follow from it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from llmtrain.base.places import Place, Shape

Range = tuple[int, int]  # begin and end


@dataclass(frozen=True)
class Cut:
    """The division of a tensor along one dimension; a rank's part is made of one range or several."""

    dim: int
    ranges: tuple[tuple[Range, ...], ...]  # of each rank, in the whole, in the order in which the rank holds them
    shape: Shape  # of the whole
    visible: int  # length of the dimension without vocabulary padding, which comes last

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """Copy the part of ``rank``."""
        pieces = [whole.narrow(self.dim, begin, end - begin) for begin, end in self.ranges[rank]]
        return (
            torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the parts of all ranks into the whole, vocabulary padding included."""
        whole = parts[0].new_empty(self.shape)
        for part, ranges in zip(parts, self.ranges, strict=True):
            start = 0
            for begin, end in ranges:
                whole.narrow(self.dim, begin, end - begin).copy_(part.narrow(self.dim, start, end - begin))
                start += end - begin
        return whole

    def length(self, rank: int) -> int:
        """The length of the part of ``rank`` along the dimension."""
        return sum(end - begin for begin, end in self.ranges[rank])

    def places(self, rank: int, held: Place, shape: Shape) -> Place | tuple[Place, ...]:
        """The boxes, in the whole, of a tensor of ``shape`` that has the place ``held`` in the part of ``rank``."""
        stored = None if self.visible == self.shape[self.dim] else with_size(self.shape, self.dim, self.visible)
        low, high = held.offset[self.dim], held.offset[self.dim] + shape[self.dim]
        places, start = [], 0
        for begin, end in self.ranges[rank]:
            first, last = max(low, start), min(high, start + end - begin)
            if first < last:
                offset = with_size(held.offset, self.dim, begin + first - start)
                size = with_size(shape, self.dim, last - first)
                places.append(Place(offset, self.shape, held.is_owner, size, stored))
            start += end - begin
        if len(places) > 1:
            return tuple(places)
        if not places:  # nothing of it
            return Place(with_size(held.offset, self.dim, self.ranges[rank][0][0]), self.shape, False, None, stored)
        return replace(places[0], shape=None)


def with_size(sizes: Shape, dim: int, value: int) -> Shape:
    """Return ``sizes`` with ``value`` for the dimension ``dim``."""
    return (*sizes[:dim], value, *sizes[dim + 1 :])


def even_ranges(sections: Iterable[int], ranks: int) -> tuple[tuple[Range, ...], ...]:
    """Divide each of the ``sections``, one behind the other, evenly over the ranks."""
    of_rank: list[list[Range]] = [[] for _ in range(ranks)]
    start = 0
    for size in sections:
        assert size % ranks == 0
        for rank in range(ranks):
            of_rank[rank].append((start + rank * size // ranks, start + (rank + 1) * size // ranks))
        start += size
    return tuple(map(tuple, of_rank))


def even_bounds(size: int, ranks: int) -> tuple[int, ...]:
    """The begin of each rank's range of ``size`` elements, and the end of the last; lengths differ by one at most."""
    return tuple(rank * size // ranks for rank in range(ranks + 1))


def bounded_ranges(bounds: Sequence[int], size: int) -> tuple[tuple[Range, ...], ...]:
    """The ranges between ``bounds`` of a dimension that ends at ``size``."""
    return tuple(((min(begin, size), min(end, size)),) for begin, end in pairwise(bounds))
