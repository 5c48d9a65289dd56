"""The checkpoints of a run written again as several ranks would have written them."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.base.places import Place
from llmtrain.base.world import World
from llmtrain.checkpoint.directory import find_checkpoints
from llmtrain.checkpoint.format import read_state
from llmtrain.checkpoint.policy import Checkpoint
from llmtrain.checkpoint.stored_tensors import read_group
from llmtrain.checkpoint.writer import Saver, SaveResult
from tests.helpers.worlds import on_ranks


def rows_of(length: int, world: World) -> tuple[int, int]:
    """Start and end of this rank's rows, as FSDP2 divides: the last ranks have fewer, or none."""
    each = -(-length // world.size)
    return min(world.rank * each, length), min((world.rank + 1) * each, length)


def divide(model: dict[str, Tensor], optimizer: dict[str, Tensor], world: World) -> tuple[Any, Any, dict[str, Place]]:
    """This rank's rows of every parameter and its state, padded as in training, and their places."""
    own_model, own_optimizer, places = {}, {}, {}
    for name, tensor in model.items():
        moments = [value for entry, value in optimizer.items() if entry.split("/")[0] == name and value.dim()]
        padded = moments[0].shape if moments else tensor.shape
        whole = F.pad(tensor, (0, 0, 0, padded[0] - tensor.shape[0])) if padded != tensor.shape else tensor
        start, end = rows_of(len(whole), world)
        places[name] = Place(
            (start, *(0 for _ in whole.shape[1:])), tuple(whole.shape), True, stored=tuple(tensor.shape)
        )
        own_model[name] = whole[start:end]
    for entry, value in optimizer.items():
        start, end = rows_of(len(value), world) if value.dim() else (0, 0)
        own_optimizer[entry] = value[start:end] if value.dim() else value
    return own_model, own_optimizer, places


def shard_run(run_dir: Path, size: int) -> None:
    """Write every checkpoint of a run again, by so many ranks that each hold rows of every tensor."""
    policy = Checkpoint(0, 0.0, True, True, 0, 0, 0)
    for path in find_checkpoints(run_dir):
        state, config = read_state(path), (path / "config.yaml").read_text()
        model, optimizer = read_group(path, "model"), read_group(path, "optimizer")

        def on_rank(
            world: World,
            model: dict[str, Tensor] = model,
            optimizer: dict[str, Tensor] = optimizer,
            state: dict[str, Any] = state,
            config: str = config,
        ) -> SaveResult | None:
            parts, moments, places = divide(model, optimizer, world)
            device = torch.device("cpu")
            with Saver(policy, run_dir, device, config_text=config, world=world, places=places) as saver:
                saver.begin(parts, moments, state, {})
                return saver.collect(wait=True)

        for saved in on_ranks(size, on_rank):
            assert saved is not None
            assert saved.error is None, saved.error
        assert (path / "index.json").is_file()
