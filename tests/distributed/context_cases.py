"""Training with ranks that share the positions of sequences beside one process, on every rank of a test's job."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmtrain.base.places import places_of
from llmtrain.base.world import World
from llmtrain.data import Batch
from llmtrain.distributed.context import SharedPositions
from llmtrain.distributed.options import Mesh
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.rank_group import RankGroup
from llmtrain.distributed.share import share_data, with_context_as_data
from llmtrain.distributed.tensor import TensorParallel
from llmtrain.distributed.tensor_group import TensorGroup
from llmtrain.distributed.unit_cut import UnitCut
from llmtrain.inference.generate import Sampling
from llmtrain.inference.generate import generate as generate_ids
from llmtrain.objective import TrainingUnit
from llmtrain.train.step import seed_step
from tests.distributed import sharing
from tests.distributed.tensor_cases import (
    EPS,
    LR,
    ROWS,
    VOCABULARY,
    difference,
    gradients,
    make_batch,
    make_unit,
    squares,
)
from tests.helpers.adapted import seeded
from tests.helpers.options import make_option

CPU = torch.device("cpu")


def device_mesh(mesh: Mesh) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(mesh.degrees.values()), mesh_dim_names=tuple(mesh.degrees))


def share(world: World, unit: TrainingUnit, degrees: dict[str, int]) -> tuple[Parallel, SharedPositions]:
    """``unit`` shared by the ranks of a mesh; ``shard`` -1: weights are divided over the context group."""
    is_sharded = degrees.get("shard", 1) != 1
    mesh = Mesh(**{key: abs(degree) for key, degree in degrees.items()})
    positions = SharedPositions(unit, RankGroup(device_mesh(mesh).get_group("context")))
    folded = device_mesh(with_context_as_data(mesh, is_sharded=is_sharded))
    options: Any = make_option("distributed", "none", {})
    if mesh.tensor == 1:
        return share_data(options, unit, world, folded, positions), positions
    cut = UnitCut(unit, TensorGroup(folded.get_group("tensor")), sequence_parallel=True)
    return TensorParallel(share_data(options, unit, world, folded, positions), cut), positions


def whole(parallel: Parallel, name: str, part: Tensor) -> Tensor:
    view: Any = parallel.trainable
    return view.gather(name, part.contiguous()) if hasattr(view, "gather") else part


def compare(
    world: World, keys: dict[str, Any], degrees: dict[str, int], packed: bool = False, micro: int = ROWS
) -> dict[str, float]:
    """Compare three steps of AdamW with those of one process; return the worst relative differences."""
    alone = Parallel(make_unit(**keys))
    shared, _ = share(world, make_unit(**keys), degrees)
    optimizers = [
        torch.optim.AdamW([weight for _, weight in each.weights()], lr=LR, eps=EPS, fused=True)
        for each in (shared, alone)
    ]
    worst = dict.fromkeys(("loss", "gradient", "norm", "weight"), 0.0)

    def record(key: str, value: float) -> None:
        worst[key] = max(worst[key], value)

    references = dict(alone.weights())
    for step in range(3):
        batch = make_batch(packed=packed, seed=step)
        own = batch.shard(shared.data_rank, shared.data_size)
        loss = gradients(shared, own, micro)
        ours = shared.sum_losses(torch.tensor([loss], dtype=torch.float64), None)[0].item()
        theirs = gradients(alone, batch, ROWS)
        record("loss", abs(ours - theirs) / abs(theirs))
        record("norm", abs(squares(shared) ** 0.5 / squares(alone) ** 0.5 - 1))
        for name, weight in shared.weights():
            assert (weight.grad is None) == (references[name].grad is None), name
            if step == 0 and weight.grad is not None:
                record("gradient", difference(whole(shared, name, weight.grad), references[name].grad))
        for optimizer in optimizers:
            optimizer.step()
        for each in (shared, alone):
            each.drop_gradients()
    for name, weight in shared.weights():
        record("weight", difference(whole(shared, name, weight.detach()), references[name].detach()))
    return worst


def train(world: World, keys: dict[str, Any], degrees: dict[str, int], values: dict[str, Any]) -> dict[str, Any]:
    """Compare three steps, by the step of the program, with those of one process; then a loss of one rank alone."""
    setting = sharing.Setting(**values)
    keys = keys | {"recomputed": values.get("recomputation", "").replace("none", ""), "dtype": "float64"}
    alone = Parallel(make_unit(**keys))
    expected = sharing.run(alone, setting)
    parallel, _ = share(world, make_unit(**keys), degrees)
    found = sharing.run(parallel, setting)
    numbers: dict[str, Any] = {
        name: max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(ours, theirs, strict=True))
        for name, ours, theirs in (
            ("loss", found.losses, expected.losses), ("norm", found.norms, expected.norms),
            ("largest", found.largest, expected.largest),
        )
    }  # fmt: skip
    assert found.clipped == expected.clipped
    weights = {name: whole(parallel, name, weight.detach()) for name, weight in parallel.weights()}
    numbers["weights"] = sharing.worst(weights, expected.weights)
    batch = make_batch(packed=True)
    with torch.no_grad():
        theirs = alone.unit.eval()(batch)["next_token"]
        with parallel.whole_weights():
            ours = parallel.unit.eval()(batch)["next_token"] if world.rank == world.size - 1 else theirs
        numbers["whole"] = difference(ours, theirs)
    own = [*found.losses, *found.norms, *found.largest]
    numbers["same"] = all(other == own for other in world.gather(own))
    return numbers


def scores(world: World, keys: dict[str, Any]) -> dict[str, Any]:
    """Compare an evaluation, and losses by sequence, of whole sequences with those of one process."""
    unit, batch = make_unit(**keys).eval(), make_batch(packed=True)
    with torch.no_grad():
        expected, rows = unit.score(batch)[0]["next_token"], unit.sequence_losses(batch)["next_token"]
        parallel, _ = share(world, unit, {"context": world.size})
        with parallel.scoring():
            ours, our_rows = unit.score(batch)[0]["next_token"], unit.sequence_losses(batch)["next_token"]
        summed = parallel.sum_over_data(ours)
    return {
        "loss": difference(ours, expected),
        "summed": difference(summed, expected),
        "rows": difference(our_rows, rows),
        "same": all(other == our_rows.tolist() for other in world.gather(our_rows.tolist())),
    }


def generate(world: World, keys: dict[str, Any]) -> list[list[int]]:
    """Sample tokens in one process, and on one rank with whole weights, before and after a step."""
    unit = make_unit(**keys)

    def sample() -> list[int]:
        ids = generate_ids(
            unit.model, [3, 5, 7], max_tokens=8, sampling=Sampling(0.8, 20, 1.0), generator=seeded(1),
            dtype=torch.float32, end_of_text=VOCABULARY,
        )  # fmt: skip
        return list(ids)

    alone = sample()
    parallel, _ = share(world, unit, {"context": world.size})
    results = [alone]
    for _ in range(2):
        with parallel.whole_weights():
            results.append(sample() if world.rank == world.size - 1 else alone)
        gradients(parallel, make_batch(), ROWS)
    return results


def owners(world: World, keys: dict[str, Any], degrees: dict[str, int]) -> list[str]:
    """The names of parameters with an element that no rank writes, or several."""
    parallel, _ = share(world, make_unit(**keys), degrees)
    places, view = parallel.places(), dict(parallel.trainable.named_weights())
    wrong = []
    for name in places:
        count, start = torch.zeros(places_of(places[name])[0].whole), 0
        for place in places_of(places[name]):
            rows = len(view[name]) if place.shape is None else place.shape[0]
            shape = tuple(view[name][start : start + rows].shape)
            start += rows
            if place.is_owner and 0 not in shape:
                count[tuple(slice(begin, begin + size) for begin, size in zip(place.offset, shape, strict=True))] += 1
        if not (world.sum(count) == 1).all():
            wrong.append(name)
    assert places, "no rank holds a part"
    return wrong


def drop(world: World, keys: dict[str, Any]) -> dict[str, Any]:
    """Train a step with dropout; return the loss, this rank's mask of a vector, and sums of the gradients."""
    unit = make_unit(**keys)
    parallel, _ = share(world, unit, {"context": world.size})
    seed_step(3, 0, parallel.seed_rank)
    mask = (torch.nn.functional.dropout(torch.ones(64), 0.5) > 0).tolist()
    loss = gradients(parallel, make_batch(), 3)
    sums = [weight.grad.double().sum().item() for _, weight in parallel.weights() if weight.grad is not None]
    unit.eval()
    return {"loss": loss, "plain": gradients(parallel, make_batch(), 3), "mask": mask, "sums": sums}


def low_precision(world: World, keys: dict[str, Any]) -> dict[str, float]:
    """Compare gradients in bf16 with those in fp32 of one process: the errors of one process and of the ranks."""
    batch = make_batch(packed=True)
    exact, alone = Parallel(make_unit(**keys)), Parallel(make_unit(**keys))
    shared, _ = share(world, make_unit(**keys), {"context": world.size})
    gradients(exact, batch, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(alone, batch, ROWS)
        ours = gradients(shared, batch, ROWS)
    of_alone, reference = dict(alone.weights()), dict(exact.weights())
    pairs = []
    for name, weight in shared.weights():
        right, one = reference[name].grad, of_alone[name].grad
        assert right is not None
        assert one is not None
        assert weight.grad is not None
        pairs.append([((gradient - right).norm() / right.norm()).item() for gradient in (weight.grad, one)])
    shared_error, alone_error = torch.tensor(pairs).mean(0).tolist()
    return {"loss": abs(ours / theirs - 1), "shared": shared_error, "alone": alone_error}


def pairs_and_positions(world: World, length: int) -> dict[str, Any]:
    """The pairs of a query and a key that this rank computes, and its positions, of a sequence of ``length``."""
    _, positions = share(world, make_unit(), {"context": world.size})
    stretches = positions.part.stretches(length // world.size)
    ids = torch.arange(length)[None]
    own = positions.split(Batch({"inputs": ids}, {}, length, {})).tensors["inputs"][0]
    assert own.tolist() == positions.part.positions(length // world.size, CPU).tolist()
    return {
        "pairs": sum(position + 1 for stretch in stretches for position in stretch),
        "computed": sum(len(stretch) * stretch.stop for stretch in stretches),  # masked ones included
        "positions": own.tolist(),
    }


def kept_bytes(world: World, keys: dict[str, Any], length: int, shared: bool) -> int:
    """Bytes of storage that a forward pass keeps for backward, without weights."""
    unit = make_unit(**keys, context_length=length)
    if shared:
        share(world, unit, {"context": world.size})
    weights = {weight.untyped_storage().data_ptr() for weight in unit.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, VOCABULARY, (1, length), generator=seeded())
    batch = Batch({"inputs": ids, "targets": ids}, {"next_token": length}, length, {})
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = unit(batch)
    del losses
    return sum(kept.values())


def compiled(world: World, keys: dict[str, Any]) -> dict[str, float]:
    """Compare gradients of compiled blocks with those of the same blocks uncompiled."""
    unit, batch = make_unit(**keys), make_batch(packed=True)
    shared, _ = share(world, unit, {"context": world.size})
    theirs = gradients(shared, batch, ROWS)
    expected = {name: weight.grad.clone() for name, weight in shared.weights() if weight.grad is not None}
    shared.drop_gradients()
    unit.compile_blocks()
    ours = gradients(shared, batch, ROWS)
    worst = max(difference(weight.grad, expected[name]) for name, weight in shared.weights() if name in expected)
    return {"loss": abs(ours / theirs - 1), "gradient": worst}
