"""Divisions of tensors among ranks, cut by hand, for tests of checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.places import Place, Shape
from llmtrain.base.world import Alone, World
from llmtrain.checkpoint.writer import Saver, SaveResult
from tests.checkpoint.test_policy import policy
from tests.helpers.worlds import on_ranks

CONFIG_TEXT = "name: x\n"
PADDED, KEPT = 8, 6  # rows of "embedding" in training and in a checkpoint
Held = tuple[dict[str, Tensor], dict[str, Any]]  # a rank's tensors and their places


def whole_model(value: float | None = None) -> dict[str, Tensor]:
    """Parameters as one process trains them, of every kind of shape; all ``value``, or random."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, Shape] = {
        "w": (7, 5), "half": (8, 6), "norm": (4,), "gate": (), "none": (0, 3), "embedding": (PADDED, 4), "qkv": (12, 3),
        "short": (2, 2), "shared": (3,),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if value is not None:
        tensors = {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}
    tensors["half"] = tensors["half"].bfloat16()
    tensors["embedding"][KEPT:] = 0
    return tensors


def state_of(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State as an optimizer has it: two tensors of each parameter's shape, and a number."""
    moments = {f"{name}/exp_avg": tensor.float() * 2 for name, tensor in model.items()}
    steps = {f"{name}/step": torch.tensor(7.0) for name in model}
    return moments | steps | {f"{name}/count:int": torch.tensor(3) for name in model}


def place_all(kind: str, size: int, rank: int, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The places of this rank's parts with their shapes: every parameter but "shared", which all hold as a whole."""
    places: dict[str, Any] = {}
    for name, whole in shapes.items():
        stored = (KEPT, *whole[1:]) if name == "embedding" else None
        if name == "shared" or kind == "copies":
            continue
        if name == "qkv" and kind == "strips":  # the rank's rows of q, of k and of v, one after the other
            parts = []
            for third in range(3):
                start, end = ((whole[0] // 3) * each // size for each in (rank, rank + 1))
                offset = (third * whole[0] // 3 + start, 0)
                parts.append(Place(offset, whole, True, (end - start, whole[1])))
            places[name] = tuple(parts)
            continue
        offset, shape, is_owner = _box(kind, size, rank, whole)
        places[name] = Place(offset, whole, is_owner, shape, stored)
    return places


def _box(kind: str, size: int, rank: int, whole: Shape) -> tuple[Shape, Shape, bool]:
    if not whole:
        return (), (), rank == 0
    if kind == "grid" and len(whole) > 1:  # FSDP × TP: 2 columns
        rows, columns = _chunk(whole[0], size // 2, rank // 2), _chunk(whole[1], 2, rank % 2)
        rest = whole[2:]
        return (rows[0], columns[0], *(0 for _ in rest)), (rows[1], columns[1], *rest), True
    shards, shard, is_owner = size, rank, True
    if kind in ("replicas", "grid"):  # HSDP: two replicas of size / 2 shards; of vectors also in a grid
        shards, shard, is_owner = size // 2, rank // 2, rank % 2 == 0
    start, length = _chunk(whole[0], shards, shard)
    return (start, *(0 for _ in whole[1:])), (length, *whole[1:]), is_owner


def _chunk(length: int, count: int, number: int) -> tuple[int, int]:
    """Start and length of a chunk, as FSDP2 divides: the last ones are shorter, or empty."""
    each = -(-length // count)
    start = min(number * each, length)
    return start, min(each, length - start)


def cut(tensors: Mapping[str, Tensor], places: Mapping[str, Any]) -> dict[str, Tensor]:
    """This rank's tensors: copies of its parts of whole ones."""
    parts = {}
    for name, tensor in tensors.items():
        found = places.get(name, ())
        boxes = [found] if isinstance(found, Place) else found
        views = [
            tensor[tuple(slice(a, a + n) for a, n in zip(place.offset, place.shape, strict=True))] for place in boxes
        ]
        parts[name] = torch.cat(views) if len(views) > 1 else (views[0] if views else tensor).clone()
    return parts


def held(model: Mapping[str, Tensor], kind: str, size: int, rank: int) -> Held:
    """This rank's parts of the whole ``model``, and their places as the saver takes them."""
    places = place_all(kind, size, rank, {name: tuple(tensor.shape) for name, tensor in model.items()})
    tensors = cut(model, places)
    if "embedding" not in places:
        tensors["embedding"] = tensors["embedding"][:KEPT]  # as the state dict of a whole unit gives it
    return tensors, places


def held_state(state: Mapping[str, Tensor], places: Mapping[str, Any]) -> dict[str, Tensor]:
    """This rank's parts of the whole optimizer ``state``."""
    names = {entry: entry.partition("/")[0] for entry in state}
    own = {entry: places[name] for entry, name in names.items() if name in places and state[entry].dim()}
    return cut(state, own)


def saver_of(run_dir: Path, world: World, places: Mapping[str, Any], **changes: float) -> Saver:
    """The saver of one rank."""
    device = torch.device("cpu")
    return Saver(policy(**changes), run_dir, device, config_text=CONFIG_TEXT, world=world, places=places)


def save(
    run_dir: Path, kind: str, size: int, *, step: int = 1, value: float | None = None, **changes: float
) -> list[SaveResult]:
    """Write the checkpoint of ``step`` on so many ranks; the results of all."""

    def on_rank(world: World) -> SaveResult:
        model = whole_model(value)
        tensors, places = held(model, kind, size, world.rank)
        state = held_state(state_of(model), places)
        with saver_of(run_dir, world, places, **changes) as saver:
            saver.begin(tensors, state, {"step": step}, {})
            saver.before_update()
            for tensor in (*tensors.values(), *state.values()):
                tensor.zero_()  # training goes on
            saved = saver.collect(wait=True)
        assert saved is not None
        return saved

    return on_ranks(size, on_rank) if size > 1 else [on_rank(Alone())]


def checkpoint_of(run_dir: Path, step: int = 1) -> Path:
    """The checkpoint of ``step``."""
    return run_dir / "checkpoints" / f"step-{step:08d}"
