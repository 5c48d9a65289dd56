"""This rank's parts of the parameters of a unit, filled from whole tensors or from a checkpoint."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmtrain.base.places import Places, Shape, places_of
from llmtrain.checkpoint.parts import Box, Part, placed


class OwnParts:
    """The parts that this rank holds of named parameters, in the memory of ``weights``.

    ``places``: of the parameters that it holds parts of; of ``weights`` it has the others as a whole.  ``stored``: the
    shapes that all parameters, also those of other ranks alone, have in a model's files, without vocabulary padding.
    """

    def __init__(self, weights: Mapping[str, Tensor], places: Places, stored: Mapping[str, Shape]) -> None:
        self._weights, self._stored = weights, stored
        self._parts = {
            name: [part for part, _ in placed(name, weight, places_of(places[name]))]
            if name in places
            else [Part(name, weight.detach(), (0,) * weight.dim(), tuple(weight.shape), is_owner=False)]
            for name, weight in weights.items()
        }

    def __iter__(self) -> Iterator[str]:
        """The names of the parameters that this rank has a part of."""
        return iter(self._parts)

    def only(self, names: set[str]) -> "OwnParts":
        """The parts of the parameters ``names``."""
        chosen = OwnParts({}, {}, {name: shape for name, shape in self._stored.items() if name in names})
        chosen._weights = {name: weight for name, weight in self._weights.items() if name in names}
        chosen._parts = {name: parts for name, parts in self._parts.items() if name in names}
        return chosen

    def whole(self, name: str) -> Tensor:
        """Memory for the whole parameter ``name``, padding included: the parameter itself where this rank has it all.

        It has no values yet; :meth:`put` takes them.
        """
        parts, weight = self._parts[name], self._weights[name].detach()
        whole = parts[0].whole
        return weight if whole == tuple(weight.shape) and len(parts) == 1 else weight.new_empty(whole)

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the whole parameters as a model's files have them."""
        return dict(self._stored)

    def holds(self, name: str) -> bool:
        """Return whether this rank has a part of the parameter ``name``."""
        return name in self._parts

    def within(self, name: str, shape: Shape) -> list[Part]:
        """The parts of the parameter ``name`` in a whole of ``shape``, which may lack the padding at its end.

        The padding that this rank has becomes 0.
        """
        if name not in self._parts:
            return []
        own, found = Box((0,) * len(shape), shape), []
        if shape != self._parts[name][0].whole:
            self._weights[name].detach().zero_()
        for part in self._parts[name]:
            common = part.box.overlap(own)
            if common is not None:
                view = part.tensor[common.slices_in(part.box)]
                found.append(Part(name, view, common.offset, shape, part.is_owner))
        return found

    @torch.no_grad()
    def put(self, name: str, whole: Tensor) -> None:
        """Copy this rank's parts of ``whole``, the parameter ``name`` with or without padding."""
        if name not in self._parts:
            return
        if whole.data_ptr() == self._weights[name].data_ptr() and whole.shape == self._weights[name].shape:
            return  # it has been filled in place
        all_of_it = Box((0,) * whole.dim(), tuple(whole.shape))
        for part in self.within(name, tuple(whole.shape)):
            part.tensor.copy_(whole[part.box.slices_in(all_of_it)])
