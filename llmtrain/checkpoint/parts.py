"""The parts of tensors that one rank holds, for the writing and the reading of checkpoints.

A rank's tensor lies in one box of the whole tensor, or in several; a tensor without a :class:`Place` is held as a
whole by every rank, and rank 0 writes it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from llmtrain.base.places import OUTER_MOMENTUM, Place, Places, Replica, Shape, places_of

Tensors = Mapping[str, Tensor]

# Before the key of optimizer state that each replica has its own of: one tensor for all, its first dimension theirs.
REPLICAS = "replicas/"
ALIKE = (OUTER_MOMENTUM,)  # keys of state that all replicas hold the same of


class Box(NamedTuple):
    """A box of a whole tensor."""

    offset: Shape  # of its first element in the whole
    shape: Shape

    @property
    def numel(self) -> int:
        """Elements in the box."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    def overlap(self, other: "Box") -> "Box | None":
        """The elements that are in both; None if there are none."""
        low = tuple(map(max, self.offset, other.offset))
        ends = (tuple(a + n for a, n in zip(box.offset, box.shape, strict=True)) for box in (self, other))
        shape = tuple(high - start for start, high in zip(low, map(min, *ends), strict=True))
        return Box(low, shape) if all(size > 0 for size in shape) else None

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """The slices of this box in a tensor that holds ``outer``, which contains it."""
        starts = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))


class Part(NamedTuple):
    """A tensor of this rank, or a view of one, with its box in the whole."""

    name: str  # of the whole tensor
    tensor: Tensor
    offset: Shape
    whole: Shape
    is_owner: bool  # True: this rank writes it

    @property
    def box(self) -> Box:
        """The box that it fills."""
        return Box(self.offset, tuple(self.tensor.shape))


def model_parts(tensors: Tensors, places: Places, *, is_first: bool) -> list[Part]:
    """The parts of the model in a checkpoint; ``tensors`` as this rank trains them, vocabulary padding included.

    ``is_first``: this is rank 0, which owns what every rank holds as a whole.
    """
    parts = []
    for name, tensor in tensors.items():
        if name not in places:
            parts.append(_whole(name, tensor, is_owner=is_first))
        elif 0 in (whole := places_of(places[name])[0].whole):
            parts.append(_whole(name, tensor.new_empty(whole), is_owner=is_first))
        else:
            parts += [_without_padding(part, place) for part, place in placed(name, tensor, places_of(places[name]))]
    return parts


def state_parts(tensors: Tensors, model: Tensors, places: Places, *, is_first: bool) -> list[Part]:
    """The parts of an optimizer's state, named ``<parameter>/<key>``, beside those of the ``model``.

    State of the shape of the rank's part of its parameter lies where that does.  A single number is the same for all
    parts, and is owned with the parameter's first element.  State of replicas becomes one tensor
    ``<parameter>/replicas/<key>`` with a dimension more, the first, of which each writes its own row.  Raises
    ValueError for other state of a parameter that this rank holds a part of.
    """
    parts = []
    for entry, tensor in tensors.items():
        name, _, key = entry.partition("/")
        if name not in places:
            parts.append(_whole(entry, tensor, is_owner=is_first))
            continue
        found, own = places_of(places[name]), model[name].shape
        if (replica := found[0].replica) is not None and key not in ALIKE:
            parts.append(row_of(replica, f"{name}/{REPLICAS}{key}", tensor))
            continue
        if 0 in found[0].whole:
            whole = tensor.new_empty(found[0].whole) if tensor.dim() else tensor
            parts.append(_whole(entry, whole, is_owner=is_first))
        elif tensor.shape == own:
            parts += [part for part, _ in placed(entry, tensor, found)]
        elif tensor.dim() == 0:
            parts.append(_whole(entry, tensor, is_owner=_owns_first_element(found, tuple(own))))
        elif len(found) == 1 and tuple(own) == found[0].whole:
            parts.append(_whole(entry, tensor, is_owner=found[0].is_owner))
        else:
            raise ValueError(
                f"optimizer state {entry}: has the shape {list(tensor.shape)}, this rank's part of {name} "
                f"{list(own)}; state of another shape than its parameter's cannot be divided among ranks"
            )
    return parts


def owned(parts: Sequence[Part]) -> dict[str, Part]:
    """The parts that this rank writes, by their keys in its file; those without elements are left out.

    The key is the tensor's name, and for further parts of it ``name#2``, ``name#3`` …
    """
    keys: dict[str, Part] = {}
    counts: dict[str, int] = {}
    for part in parts:
        if part.is_owner and (part.tensor.numel() or part.box.shape == part.whole):
            counts[part.name] = number = counts.get(part.name, 0) + 1
            keys[part.name if number == 1 else f"{part.name}#{number}"] = part
    return keys


def row_of(replica: Replica, name: str, tensor: Tensor) -> Part:
    """The row of ``replica`` in a tensor that has one of each; the replica writes it."""
    offset, whole = (replica.number, *[0] * tensor.dim()), (replica.count, *tensor.shape)
    return Part(name, tensor.detach()[None], offset, whole, is_owner=True)


def _whole(name: str, tensor: Tensor, *, is_owner: bool) -> Part:
    return Part(name, tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape), is_owner)


def placed(name: str, tensor: Tensor, places: Sequence[Place]) -> list[tuple[Part, Place]]:
    """The parts of one tensor: itself, several along its first dimension, or several that are flattened in it."""
    tensor, start, parts = tensor.detach(), 0, []
    is_flat = tensor.dim() == 1 != len(places[0].whole)
    for place in places:
        view = tensor
        if is_flat or len(places) > 1:
            assert place.shape is not None, (name, place)
            length = math.prod(place.shape) if is_flat else place.shape[0]
            view = tensor[start : start + length]
            view = view.view(place.shape) if is_flat else view
            start += length
        box = Box(place.offset, tuple(view.shape))
        ends = [a + n for a, n in zip(box.offset, box.shape, strict=True)]
        assert place.shape in (None, box.shape), (name, place, box)
        assert len(place.whole) == len(ends), (name, place, box)
        assert not box.numel or all(map(int.__le__, ends, place.whole)), (name, place, box)
        parts.append((Part(name, view, place.offset, place.whole, place.is_owner), place))
    assert (len(places) == 1 and not is_flat) or start == len(tensor), (name, places)
    return parts


def _without_padding(part: Part, place: Place) -> Part:
    if place.stored is None:
        return part
    view = part.tensor
    for dim, end in enumerate(place.stored):
        view = view.narrow(dim, 0, max(0, min(view.shape[dim], end - part.offset[dim])))
    return part._replace(tensor=view, whole=place.stored)


def _owns_first_element(places: Sequence[Place], own: Shape) -> bool:
    return any(
        place.is_owner
        and not any(place.offset)
        and Box(place.offset, own if place.shape is None else place.shape).numel
        for place in places
    )


def whole_bytes(model: Tensors, optimizer: Tensors, places: Places) -> int:
    """Bytes of the whole tensors of a checkpoint, of which this rank holds parts."""
    parts = [*model_parts(model, places, is_first=True), *state_parts(optimizer, model, places, is_first=True)]
    sizes = {part.name: Box(part.offset, part.whole).numel * part.tensor.element_size() for part in parts}
    return sum(sizes.values())
