"""Reading a checkpoint back into a model and an optimizer."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.places import Places, places_of
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.format import read_state, verify_checkpoint
from llmtrain.checkpoint.model_state import NO_PLACES, NO_WEIGHTS, restore_model
from llmtrain.checkpoint.optimizer_state import load_state_tensors
from llmtrain.checkpoint.parts import placed
from llmtrain.checkpoint.replica_state import (
    fill_source,
    load_exchanged,
    of_first_replica,
    read_source,
    sources,
    with_exchanged,
)
from llmtrain.checkpoint.stored_tensors import StoredTensors, group_file, is_sharded, read_group
from llmtrain.objective import TrainingUnit


def restore(
    path: Path,
    unit: TrainingUnit,
    optimizer: torch.optim.Optimizer,
    *,
    fresh_optimizer: bool = False,
    weights: Mapping[str, Tensor] = NO_WEIGHTS,
    places: Places = NO_PLACES,
) -> dict[str, Any]:
    """Fill ``unit`` and ``optimizer`` from the checkpoint at ``path`` and return the content of its state file.

    The caller has compared the checkpoint with its manifest.  With ``fresh_optimizer`` the optimizer keeps its own
    state.  ``places`` (of :func:`stored_places`): the parameters that this rank holds parts of, which are in
    ``weights`` and are filled in place; only these parts are read, whatever number of ranks has written the checkpoint.
    Raises :class:`CheckpointError` naming the file.
    """
    restore_model(unit, path, weights, places)
    try:
        if not fresh_optimizer:
            load_state_tensors(optimizer, read_optimizer(path, weights, places))
        elif any(place.replica is not None for found in places.values() for place in places_of(found)):
            load_exchanged(optimizer, read_state_parts(path, weights, places))
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{group_file(path, 'optimizer') if places else path}: {error}") from error
    return read_state(path)


def read_optimizer(checkpoint: Path, weights: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """The optimizer state in ``checkpoint``: whole, or with ``places`` this rank's parts of it."""
    if places or is_sharded(checkpoint):
        return read_state_parts(checkpoint, weights, places)
    return of_first_replica(read_group(checkpoint, "optimizer"))


def read_state_parts(checkpoint: Path, weights: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """The optimizer state in ``checkpoint``, of which only this rank's parts are read.

    State of the shape of a whole parameter is divided as the parameter is, other state is read as a whole, and that of
    a parameter that other ranks hold is not read; see :func:`sources` about replicas.  Raises
    :class:`CheckpointError` naming the tensor where that cannot be.
    """
    tensors = {}
    with StoredTensors(checkpoint, "optimizer") as stored:
        for entry, source in sources(stored.tensors, places).items():
            name = entry.partition("/")[0]
            if name not in places:
                tensors[entry] = read_source(stored, source)
                continue
            if places[name] == ():
                continue
            own, whole = tuple(weights[name].shape), places_of(places[name])[0].whole
            if not source.shape or own == whole:
                tensors[entry] = read_source(stored, source)
            elif source.shape == whole:
                part = torch.empty(own, dtype=stored.dtype(source.entry))
                for piece, _ in placed(source.entry, part, places_of(places[name])):
                    fill_source(stored, source, piece)
                tensors[entry] = part
            else:
                raise CheckpointError(
                    f"{stored.path}: {entry} has the shape {list(source.shape)}, {name} {list(whole)}; state of "
                    "another shape than its parameter's cannot be divided among ranks"
                )
    return with_exchanged(tensors, weights, places)


def newest_intact(
    checkpoints: Sequence[Path], *, at_most: int | None = None, known: Collection[Path] = ()
) -> tuple[Path | None, list[CheckpointError]]:
    """The newest of ``checkpoints`` that agrees with its manifest, and the errors of the newer ones.

    ``at_most`` leaves out later steps; those in ``known`` are known to be intact.  None if no checkpoint is intact.
    """
    damaged: list[CheckpointError] = []
    for path in sorted(checkpoints, reverse=True):
        if at_most is not None and step_of(path) > at_most:
            continue
        try:
            if path not in known:
                verify_checkpoint(path)
            return path, damaged
        except CheckpointError as error:
            damaged.append(error)
    return None, damaged
