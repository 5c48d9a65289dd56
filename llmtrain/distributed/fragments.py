"""The elements of parameters that a rank trains where ZeRO divides them: stretches of flattened parameters, by name."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.base.places import Place, Shape
from llmtrain.base.world import World
from llmtrain.distributed.local_shards import largest_of
from llmtrain.objective import TrainingUnit


@dataclass(frozen=True, eq=False)
class Fragment:
    """The elements ``begin`` to ``begin + len(local)`` of a flattened parameter of the shape ``whole``."""

    local: nn.Parameter  # one dimension; without elements where this rank has none of the parameter
    begin: int
    whole: Shape

    def places(self) -> tuple[Place, ...]:
        """The boxes of the whole that the elements fill, one after the other."""
        found = boxes(self.whole, self.begin, self.begin + len(self.local))
        if not found:
            found = [((0,) * len(self.whole), (0,) * len(self.whole))]
        return tuple(Place(offset, self.whole, True, shape) for offset, shape in found)


def boxes(whole: Shape, begin: int, end: int) -> list[tuple[Shape, Shape]]:
    """Offsets and shapes of the boxes that the flattened elements from ``begin`` to ``end`` fill, in their order.

    Part of a row, whole rows, part of a row: at most ``2 n - 1`` for ``n`` dimensions.
    """
    if begin >= end:
        return []
    if len(whole) < 2:
        return [((begin,) * len(whole), (end - begin,) * len(whole))]
    size = math.prod(whole[1:])
    first, last = -(-begin // size), end // size  # whole rows
    if first > last:  # within one row
        return _in_row(whole, last, begin, end)
    found = _in_row(whole, first - 1, begin, first * size)
    if first < last:
        found.append(((first, *(0 for _ in whole[1:])), (last - first, *whole[1:])))
    return found + _in_row(whole, last, last * size, end)


def _in_row(whole: Shape, row: int, begin: int, end: int) -> list[tuple[Shape, Shape]]:
    start = row * math.prod(whole[1:])
    return [((row, *offset), (1, *shape)) for offset, shape in boxes(whole[1:], begin - start, end - start)]


class Fragments:
    """The view of an optimizer of a unit that ZeRO divides: :class:`llmtrain.optimizer.ShardedTrainable`.

    ``fragments`` are those of the parameters that are divided, by name: the same names on every rank.  The others are
    frozen, and whole on every rank.
    """

    def __init__(self, unit: TrainingUnit, world: World, fragments: Mapping[str, Fragment]) -> None:
        self.unit, self.world, self.fragments = unit, world, fragments
        self._whole = {name: weight for name, weight in unit.named_weights() if name not in fragments}
        self._order = [name for name, _ in unit.named_weights()]
        self._layers = {name: unit.layer_index(name) for name in self._order}

    @property
    def num_layers(self) -> int:
        return self.unit.num_layers

    @property
    def trained_names(self) -> Sequence[str]:
        return self.unit.trained_names

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in self._order:
            yield name, self.fragments[name].local if name in self.fragments else self._whole[name]

    def layer_index(self, name: str) -> int:
        return self._layers[name]

    def whole_shape(self, name: str) -> Shape:
        return self.fragments[name].whole if name in self.fragments else tuple(self._whole[name].shape)

    def first_element(self, name: str) -> int:
        return self.fragments[name].begin if name in self.fragments else 0

    def gather(self, name: str, part: Tensor) -> Tensor:
        fragment = self.fragments[name]
        whole = part.new_zeros(math.prod(fragment.whole))
        whole[fragment.begin : fragment.begin + len(part)] = part
        dist.all_reduce(whole)
        return whole.view(fragment.whole)

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        fragment = self.fragments[name]
        return whole.reshape(-1).narrow(0, fragment.begin, len(fragment.local))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The fragments of the trained parameters."""
        return [(name, weight) for name, weight in self.named_weights() if weight.requires_grad]

    def places(self) -> Mapping[str, Sequence[Place]]:
        """The boxes of the parameters that are divided."""
        return {name: fragment.places() for name, fragment in self.fragments.items()}

    def take_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Give each fragment its gradient, in the same memory; those that are not named have no elements here."""
        for name, fragment in self.fragments.items():
            if fragment.local.requires_grad:
                fragment.local.grad = gradients[name] if len(fragment.local) else torch.empty_like(fragment.local)

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        for fragment in self.fragments.values():
            fragment.local.grad = None

    def sum_of_squares(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        """Sum ``squares`` ``(parameters,)``, of this rank's elements, over the whole parameters: one exchange."""
        return self.world.sum(squares)

    def largest(self, value: Tensor) -> Tensor:
        """The largest ``value`` of all ranks; NaN if one of them is."""
        return largest_of(value, self.world)
