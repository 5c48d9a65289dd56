"""The model in a checkpoint: the tensors that are saved, and their restoration."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from llmtrain.base.places import Places, Shape, places_of
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.own_parts import OwnParts
from llmtrain.checkpoint.parts import model_parts
from llmtrain.checkpoint.stored_tensors import StoredTensors, group_file, read_group
from llmtrain.objective import TrainingUnit

NO_WEIGHTS: Mapping[str, Tensor] = MappingProxyType({})
NO_PLACES: Places = MappingProxyType({})


def saved_tensors(
    unit: TrainingUnit, weights: Mapping[str, Tensor] = NO_WEIGHTS, places: Places = NO_PLACES
) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds of ``unit``: all, or those that are trained beside frozen weights.

    ``places``: of the parameters that this rank holds parts of, which are in ``weights``; they are given as they are
    held, with vocabulary padding.
    """
    trained = {name for name, _ in unit.trained_weights()} if unit.has_base else None
    if places:
        return dict(_as_held(unit, weights, places, trained))
    return {name: tensor for name, tensor in unit.weights_state().items() if trained is None or name in trained}


def _as_held(
    unit: TrainingUnit, weights: Mapping[str, Tensor], places: Places, names: Collection[str] | None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors ``names`` (None: all) of a unit that is divided among ranks, whose state dict would gather them."""
    for name, parameter in unit.named_weights():
        if names is not None and name not in names:
            continue
        if name in places:
            if places[name] != ():
                yield name, weights[name].detach()
        else:
            rows = unit.model.vocab_size if name in unit.model.padded_weights else None
            yield name, parameter.detach()[:rows] if rows else parameter.detach()
    if names is None:
        yield from ((name, buffer) for name, buffer in unit.saved_buffers() if places.get(name) != ())


def _names_elsewhere(unit: TrainingUnit, places: Places) -> set[str]:
    """The tensors of a checkpoint of ``unit`` that other ranks hold alone."""
    trained = {name for name, _ in unit.trained_weights()} if unit.has_base else None
    return {name for name, found in places.items() if found == () and (trained is None or name in trained)}


def stored_places(unit: TrainingUnit, places: Places) -> Places:
    """The places of the parameters of ``unit`` that a rank holds parts of, with the shapes that checkpoints have.

    A checkpoint of the model holds no vocabulary padding.
    """
    padded, size = unit.model.padded_weights, unit.model.vocab_size
    return {
        name: tuple(replace(place, stored=(size, *place.whole[1:])) for place in places_of(found))
        if name in padded else found
        for name, found in places.items()
    }  # fmt: skip


def restore_model(
    unit: TrainingUnit, checkpoint: Path, weights: Mapping[str, Tensor] = NO_WEIGHTS, places: Places = NO_PLACES
) -> None:
    """Copy every tensor of ``checkpoint`` into ``unit``; they must be exactly those of :func:`saved_tensors`.

    With ``places`` the parts in ``weights`` are filled in place.  Raises :class:`CheckpointError` naming the file.
    """
    if not places:
        tensors = read_fitting(checkpoint, saved_tensors(unit))
        unit.load_weights(tensors, strict=not unit.has_base)
        return
    held = saved_tensors(unit, weights, places)
    with StoredTensors(checkpoint, "model") as stored:
        _refuse(stored.path, _misnamed([*held, *_names_elsewhere(unit, places)], stored.tensors))
        for name in held.keys() & places.keys():
            held[name].zero_()  # vocabulary padding, which no checkpoint holds
        for part in model_parts(held, places, is_first=False):
            stored.fill(part)


def read_fitting(checkpoint: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors in ``checkpoint``, on the device of those ``expected``.

    Raises :class:`CheckpointError` unless names and shapes are the same.
    """
    device = next(iter(expected.values())).device if expected else torch.device("cpu")
    tensors = read_group(checkpoint, "model", device)
    problems = _misnamed(expected, tensors)
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, this model's is {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    _refuse(group_file(checkpoint, "model"), problems)
    return tensors


def read_own_parts(checkpoint: Path, parts: OwnParts) -> None:
    """Fill ``parts`` from ``checkpoint``, of which this rank reads no other elements.

    Raises :class:`CheckpointError` unless names and shapes are the same.
    """
    with StoredTensors(checkpoint, "model") as stored:
        shapes = parts.shapes()
        _refuse(stored.path, _misnamed(shapes, stored.tensors) + _misshapen(shapes, stored))
        for name, shape in shapes.items():
            for part in parts.within(name, shape):
                stored.fill(part)


def _misshapen(expected: Mapping[str, Shape], stored: StoredTensors) -> list[str]:
    found = {name: stored.tensors[name].shape for name in expected if name in stored.tensors}
    return [
        f"{name} is {shape}, this model's is {expected[name]}"
        for name, shape in found.items()
        if shape != expected[name]
    ]


def _misnamed(expected: Collection[str], found: Collection[str]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    return problems + [f"{name} is not in this model" for name in found if name not in expected]


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(problems[:3])}{more}")
