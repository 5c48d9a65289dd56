"""Optimizer state of replicas that train on their own, as another number of replicas, or of none, reads it.

With ``n`` replicas in a checkpoint, replica ``r`` of a run takes up weights and state of number ``r mod n``.  A run
without replicas takes the common weights and the state of the first one.  A run with replicas that reads the checkpoint
of a run without gives each the same state, the model's weights, and an outer momentum of zeros.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.base.places import OUTER_MOMENTUM, OWN_WEIGHT, Places, Shape, places_of
from llmtrain.checkpoint.index import StoredTensor
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.parts import REPLICAS, Part
from llmtrain.checkpoint.stored_tensors import StoredTensors

EXCHANGED = (OWN_WEIGHT, OUTER_MOMENTUM)  # keys that only a run with replicas has


class Source(NamedTuple):
    """The tensor of a checkpoint that an entry of the optimizer's state is read from."""

    entry: str  # its name there
    shape: Shape  # of the entry, without the dimension of the replicas
    replica: int | None  # the row that is read; None: the tensor as it is
    replicas: int = 1  # rows


def sources(stored: Mapping[str, StoredTensor], places: Places) -> dict[str, Source]:
    """The sources of the optimizer's state by the entries of this run: see the module about replicas."""
    found = {}
    for entry, tensor in stored.items():
        name, _, key = entry.partition("/")
        own = next((place.replica for place in places_of(places.get(name, ()))), None)
        key = key.removeprefix(REPLICAS)
        if own is None and key in EXCHANGED:
            continue
        if entry == f"{name}/{key}":
            found[entry] = Source(entry, tensor.shape, None)
        else:
            count = tensor.shape[0]
            number = 0 if own is None else own.number % count
            found[f"{name}/{key}"] = Source(entry, tensor.shape[1:], number, count)
    return found


def read_source(stored: StoredTensors, source: Source) -> Tensor:
    """Read a whole entry."""
    if source.replica is None:
        return stored.read(source.entry)
    tensor = torch.empty(source.shape, dtype=stored.dtype(source.entry))
    fill_source(stored, source, Part(source.entry, tensor, (0,) * tensor.dim(), source.shape, is_owner=False))
    return tensor


def fill_source(stored: StoredTensors, source: Source, part: Part) -> None:
    """Copy the elements of ``part`` of an entry."""
    if source.replica is not None:
        part = Part(
            part.name, part.tensor[None], (source.replica, *part.offset), (source.replicas, *part.whole), is_owner=False
        )
    stored.fill(part)


def of_first_replica(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole ``tensors`` as a run without replicas takes them: those of the first one."""
    found = {}
    for entry, tensor in tensors.items():
        key = entry.partition("/")[2]
        if key.removeprefix(REPLICAS) not in EXCHANGED:
            found[entry.replace(f"/{REPLICAS}", "/", 1)] = tensor[0] if key.startswith(REPLICAS) else tensor
    return found


def with_exchanged(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """``tensors`` with what replicas start from where the checkpoint is of a run without; ``weights``: the common."""
    completed = dict(tensors)
    for name, found in places.items():
        if any(place.replica is not None for place in places_of(found)) and name in weights:
            completed.setdefault(f"{name}/{OWN_WEIGHT}", weights[name].detach())
            completed.setdefault(f"{name}/{OUTER_MOMENTUM}", torch.zeros_like(weights[name], dtype=torch.float32))
    return completed


@torch.no_grad()
def load_exchanged(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the replica's own weights and the outer momentum alone, into an optimizer of another kind."""
    for entry, tensor in state_tensors(optimizer).items():
        if entry.partition("/")[2] in EXCHANGED:
            tensor.copy_(tensors[entry])
