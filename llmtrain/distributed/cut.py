"""The division of parameters over the ranks of a tensor group, in place, and the boxes that follow from it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from llmtrain.distributed.parallel import Place

Range = tuple[int, int]  # begin and end


@dataclass(frozen=True)
class Cut:
    """The division of a tensor along one dimension; a rank's part is made of one range or several."""

    dim: int
    ranges: tuple[tuple[Range, ...], ...]  # of each rank, in the whole, in the order in which the rank holds them
    shape: tuple[int, ...]  # of the whole
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

    def places(self, rank: int, *, is_owner: bool) -> tuple[Place, ...]:
        """The boxes of the part of ``rank``, without vocabulary padding."""
        whole = _with(self.shape, self.dim, self.visible)
        zeros = (0,) * len(self.shape)
        places, start = [], 0
        for begin, end in self.ranges[rank]:
            if (length := min(end, self.visible) - begin) > 0:
                offset, first = _with(zeros, self.dim, begin), _with(zeros, self.dim, start)
                places.append(Place(offset, whole, is_owner, first, _with(self.shape, self.dim, length)))
            start += end - begin
        return tuple(places)


def _with(sizes: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
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


def box_within(outer: Sequence[Place], inner: Sequence[Place], local_shape: tuple[int, ...]) -> tuple[Place, ...]:
    """The boxes in the whole of what ``inner`` holds of a tensor of ``local_shape``, which has the boxes ``outer``."""
    places = []
    for out in outer:
        out_start, out_shape = _extent(out, local_shape)
        for held in inner:
            held_start = held.start or (0,) * len(local_shape)
            held_shape = held.shape or tuple(
                whole - offset for whole, offset in zip(held.whole, held.offset, strict=True)
            )
            # both as intervals of the tensor of ``local_shape``
            begin = tuple(map(max, out_start, held.offset))
            end = tuple(
                min(a + n, b + m) for a, n, b, m in zip(out_start, out_shape, held.offset, held_shape, strict=True)
            )
            if all(b < e for b, e in zip(begin, end, strict=True)):
                places.append(
                    replace(
                        out,
                        offset=tuple(o + b - s for o, b, s in zip(out.offset, begin, out_start, strict=True)),
                        is_owner=out.is_owner and held.is_owner,
                        start=tuple(s + b - o for s, b, o in zip(held_start, begin, held.offset, strict=True)),
                        shape=tuple(e - b for b, e in zip(begin, end, strict=True)),
                    )
                )
    return tuple(places)


def _extent(place: Place, local_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and shape of a box in the rank's tensor."""
    start = place.start or (0,) * len(local_shape)
    return start, place.shape or tuple(size - s for size, s in zip(local_shape, start, strict=True))
