"""Training under tensor parallelism beside one process, on every rank of a test's job."""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.base.places import places_of
from llmtrain.base.world import World
from llmtrain.data import Batch
from llmtrain.distributed.data_parallel import Replicated, Sharded
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.tensor import TensorParallel
from llmtrain.distributed.tensor_group import TensorGroup
from llmtrain.distributed.unit_cut import UnitCut
from llmtrain.inference.generate import Sampling
from llmtrain.inference.generate import generate as generate_ids
from llmtrain.objective import TrainingUnit
from llmtrain.objective.causal import Causal
from tests.distributed import sharing
from tests.helpers.adapted import make, seeded, stir
from tests.helpers.batches import batch_of
from tests.helpers.options import make_option

VOCABULARY, LENGTH, ROWS = 101, 14, 6  # padded to 128 inside
SIZES = {"num_layers": 2, "num_heads": 4, "context_length": 32, "dropout": 0.0, "vocab_size": VOCABULARY}
FAMILIES: dict[str, dict[str, Any]] = {
    "tiny": SIZES | {"hidden_size": 32, "initialisation": "torch"},  # biases that are not 0
    "llama_tiny": SIZES | {"hidden_size": 32, "num_kv_heads": 4, "intermediate_size": 48, "initial_std": 0.2},
}
LR = 1e-3
EPS = 1e-4  # gradients that are 0 but for rounding, of keys' biases, would else decide about updates


def make_unit(
    family: str = "tiny", lora: str = "", targets: tuple[str, ...] = ("all-linear",), z_loss: float = 0.0,
    recomputed: str = "", dtype: str = "float32", **keys: Any,
) -> TrainingUnit:  # fmt: skip
    """A unit with the same random weights on every rank."""
    config = make_option("model", family, FAMILIES[family] | keys)
    model = config.create(VOCABULARY, torch.device("cpu"), seeded())
    unit = Causal(z_loss=z_loss, chunk_tokens=16).build(model, (), seeded())
    if lora:
        make(lora, targets=list(targets)).apply(model, seeded(4))
    stir(model)
    with torch.no_grad():
        for name, weight in unit.named_weights():
            if not name.startswith("blocks.") and len(weight) > VOCABULARY and "position" not in name:
                weight[VOCABULARY:] = 0.0  # padding
    if recomputed:
        values = {"full": {"offload": False}, "selective": {"offload": False, "by": "operation", "every": 1}}
        option: ActivationCheckpointing = make_option("activation_checkpointing", recomputed, {}, **values[recomputed])
        option.apply(model)
    return unit.to(getattr(torch, dtype))


def make_batch(*, packed: bool = False, seed: int = 0) -> Batch:
    """Rows with different numbers of targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(2))
    for row in range(ROWS):
        targets[row, : 3 * row % LENGTH] = -100
    segments = (torch.arange(LENGTH) // 5 + 1).expand(ROWS, LENGTH).contiguous() if packed else None
    return batch_of(inputs, targets, segments)


MESHES: dict[str, dict[str, int]] = {  # -1: the rest of the world
    "tensor": {"tensor": -1},
    "ddp": {"replicate": -1, "tensor": 2},
    "fsdp": {"shard": -1, "tensor": 2},
    "hsdp": {"replicate": 2, "shard": -1, "tensor": 2},
}


def make_parallel(
    world: World, unit: TrainingUnit, *, sequence_parallel: bool = False, mode: str = "tensor"
) -> TensorParallel:
    """``unit`` cut over the ranks of tensor groups, which share it by ``mode``."""
    degrees = MESHES[mode]
    known = math.prod(size for size in degrees.values() if size > 0)
    shape = tuple(size if size > 0 else world.size // known for size in degrees.values())
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=tuple(degrees))
    cut = UnitCut(unit, TensorGroup(mesh.get_group("tensor")), sequence_parallel=sequence_parallel)
    inner = Parallel(unit, world)
    if mode == "ddp":
        inner = Replicated(unit, world, mesh["replicate"])
    elif mode != "tensor":
        inner = Sharded(unit, world, mesh["shard"] if mode == "fsdp" else mesh["replicate", "shard"])
    return TensorParallel(inner, cut)


def gradients(parallel: Parallel, batch: Batch, micro_batch_size: int) -> float:
    """Run the passes of a step; return its loss."""
    parts = list(batch.split(micro_batch_size))
    loss = 0.0
    for number, part in enumerate(parts, 1):
        with parallel.prepare(is_last=number == len(parts)):
            losses = parallel.forward(part)
            total = sum(losses[name] / batch.counts[name] for name in losses)
            assert isinstance(total, Tensor)
            parallel.backward(total, is_last=number == len(parts))
        loss += total.item()
    return loss


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest element; NaN counts as infinite."""
    value = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
    return math.inf if math.isnan(value) else value


def squares(parallel: Parallel) -> float:
    """The squared norm of all gradients."""
    named = [(name, weight.grad) for name, weight in parallel.weights() if weight.grad is not None]
    own = torch.stack([gradient.square().sum() for _, gradient in named])
    return parallel.sum_of_squares(own, [name for name, _ in named]).sum().item()


def compare(
    world: World, keys: dict[str, Any], packed: bool = False, sequence_parallel: bool = False, micro: int = ROWS
) -> dict[str, float]:
    """Compare three steps of AdamW with those of one process; return the worst relative differences."""
    unit = make_unit(**keys)
    alone = Parallel(copy.deepcopy(unit))
    if keys.get("recomputed"):  # a copied block would compute with the weights of the original
        alone = Parallel(make_unit(**keys))
    shared = make_parallel(world, unit, sequence_parallel=sequence_parallel)
    optimizers = [
        torch.optim.AdamW([weight for _, weight in each.weights()], lr=LR, eps=EPS, fused=True)
        for each in (shared, alone)
    ]
    worst = dict.fromkeys(("loss", "gradient", "norm", "weight"), 0.0)

    def record(key: str, value: float) -> None:
        worst[key] = max(worst[key], value)

    assert shared.cut.cuts, "nothing was cut"
    for step in range(3):
        batch = make_batch(packed=packed, seed=step)
        ours, theirs = gradients(shared, batch, micro), gradients(alone, batch, ROWS)
        record("loss", abs(ours - theirs) / abs(theirs))
        record("norm", abs(squares(shared) ** 0.5 / squares(alone) ** 0.5 - 1))
        references = dict(alone.weights())
        for name, weight in shared.weights():
            assert (weight.grad is None) == (references[name].grad is None), name
            if step == 0 and weight.grad is not None:
                record("gradient", difference(shared.cut.whole(name, weight.grad), references[name].grad))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in shared.weights():
        record("weight", difference(shared.cut.whole(name, weight.detach()), references[name].detach()))
    return worst


def boxes(world: World, keys: dict[str, Any], mode: str = "tensor") -> dict[str, Any]:
    """Put the parameters together from the boxes that the ranks own; return the names that differ from one process's.

    Elements that no rank owns, or more than one, make a difference.
    """
    unit = make_unit(**keys)
    expected = {name: tensor.clone() for name, tensor in unit.weights_state().items()}
    parallel = make_parallel(world, unit, mode=mode)
    places, names = parallel.places(), {name for name, _ in unit.named_weights()}
    wrong, several = [], 0
    counted = make_unit(**keys)
    if unit.count_parameters() != counted.count_parameters():
        wrong.append("number of parameters")
    if unit.model.num_parameters() != counted.model.num_parameters():
        wrong.append("number of the model's parameters")
    if unit.flops_per_token(LENGTH) != counted.flops_per_token(LENGTH):
        wrong.append("operations")
    for name, weight in parallel.trainable.named_weights():
        if name not in places:
            if not torch.equal(weight, expected[name]):
                wrong.append(name)
            continue
        found = places_of(places[name])
        several += len(found) > 1
        sums = torch.zeros(2, *expected[name].shape)
        start = 0
        for place in found:
            length = len(weight) if place.shape is None else place.shape[0]
            part = weight.detach()[start : start + length]
            start += length
            stored = place.stored or place.whole
            for dim, (offset, size) in enumerate(zip(place.offset, stored, strict=True)):
                part = part.narrow(dim, 0, max(min(part.shape[dim], size - offset), 0))
            assert stored == tuple(expected[name].shape), name
            assert all(offset <= size for offset, size in zip(place.offset, place.whole, strict=True)), (name, place)
            if place.is_owner and part.numel():
                inside = tuple(slice(o, o + n) for o, n in zip(place.offset, part.shape, strict=True))
                sums[0][inside] += part
                sums[1][inside] += 1
        assert start == len(weight), name
        world.sum(sums)
        if not (torch.equal(sums[0], expected[name]) and bool((sums[1] == 1).all())):
            wrong.append(name)
    shards = parallel.trainable
    whole = dict(make_unit(**keys).named_weights())
    for name, weight in shards.named_weights():
        gathered = shards.gather(name, weight.detach())
        if not torch.equal(gathered, whole[name].detach()) or shards.whole_shape(name) != tuple(gathered.shape):
            wrong.append(f"{name} (gathered)")
        if not torch.equal(shards.own_part(name, gathered), weight.detach()):
            wrong.append(f"{name} (own part)")
    return {"wrong": wrong, "cut": len(places), "several": several, "names": len(names)}


def generate(world: World, keys: dict[str, Any], sequence_parallel: bool) -> list[list[int]]:
    """Sample tokens in one process, on all ranks in lockstep, and on one rank with whole weights."""
    unit = make_unit(**keys).eval()
    prompt = [3, 5, 7]

    def sample() -> list[int]:
        ids = generate_ids(
            unit.model, prompt, max_tokens=8, sampling=Sampling(0.8, 20, 1.0),
            generator=torch.Generator().manual_seed(1), dtype=torch.float32, end_of_text=VOCABULARY,
        )  # fmt: skip
        return list(ids)

    alone = sample()
    parallel = make_parallel(world, unit, sequence_parallel=sequence_parallel)
    together = sample()
    with parallel.whole_weights():
        first = sample() if world.is_first else alone
    again = sample()
    return [alone, together, first, again]


def scores(world: World, keys: dict[str, Any], sequence_parallel: bool) -> float:
    """Compare the scores of an evaluation and the losses by sequence with those of one process."""
    unit, batch = make_unit(**keys).eval(), make_batch(packed=True)
    with torch.no_grad():
        expected, rows = unit.score(batch)[0]["next_token"], unit.sequence_losses(batch)["next_token"]
        parallel = make_parallel(world, unit, sequence_parallel=sequence_parallel)
        with parallel.scoring():
            ours, our_rows = unit.score(batch)[0]["next_token"], unit.sequence_losses(batch)["next_token"]
        with parallel.whole_weights():
            whole = unit.score(batch)[0]["next_token"]
    return max(difference(ours, expected), difference(our_rows, rows), difference(whole, expected))


def low_precision(world: World, keys: dict[str, Any], sequence_parallel: bool) -> dict[str, float]:
    """Compare gradients in bf16 with those in fp32 of one process: the errors of one process and of the ranks."""
    unit, batch = make_unit(**keys), make_batch(packed=True)
    exact, alone = Parallel(make_unit(**keys)), Parallel(make_unit(**keys))
    gradients(exact, batch, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(alone, batch, ROWS)
    shared = make_parallel(world, unit, sequence_parallel=sequence_parallel)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(shared, batch, ROWS)
    errors = {"loss": abs(ours / theirs - 1)}
    of_alone, reference = dict(alone.weights()), dict(exact.weights())
    pairs = []
    for name, weight in shared.weights():
        right = reference[name].grad
        assert right is not None
        size = right.norm()
        found = [shared.cut.whole(name, weight.grad), of_alone[name].grad]
        pairs.append([((gradient - right).norm() / size).item() for gradient in found])
    errors["shared"], errors["alone"] = torch.tensor(pairs).mean(0).tolist()
    return errors


def drop(world: World, keys: dict[str, Any], sequence_parallel: bool) -> dict[str, Any]:
    """Train a step with dropout, and the random numbers that the step is meant to draw; return facts about it."""
    unit, batch = make_unit(**keys), make_batch()
    parallel = make_parallel(world, unit, sequence_parallel=sequence_parallel)
    torch.manual_seed(5)
    loss = gradients(parallel, batch, 3)
    sums = {name: weight.grad.double().sum().item() for name, weight in parallel.weights() if weight.grad is not None}
    replicated = {name: total for name, total in sums.items() if name not in parallel.cut.cuts}
    unit.eval()
    return {"loss": loss, "replicated": replicated, "plain": gradients(parallel, batch, 3)}


def classify(world: World) -> dict[str, float]:
    """Compare a classifier, whose head reads hidden states, with one process."""
    units = []
    for _ in range(2):
        config = make_option("model", "llama_tiny", FAMILIES["llama_tiny"])
        model = config.create(VOCABULARY, torch.device("cpu"), seeded())
        objective = make_option("objective", "classification", {}, train="all", multi_label=False)
        units.append(objective.build(model, ("a", "b", "c"), seeded()))
        stir(units[-1])
    batch = make_batch()
    targets = torch.full((ROWS, LENGTH), -100)
    targets[:, LENGTH - 2] = torch.arange(ROWS) % 3
    batch = batch_of(batch.tensors["inputs"], targets, objective=objective)
    alone, shared = Parallel(units[0]), make_parallel(world, units[1], sequence_parallel=True)
    ours, theirs = gradients(shared, batch, 2), gradients(alone, batch, ROWS)
    references = dict(alone.weights())
    worst = 0.0
    for name, weight in shared.weights():
        if weight.grad is not None:
            worst = max(worst, difference(shared.cut.whole(name, weight.grad), references[name].grad))
    return {"loss": abs(ours / theirs - 1), "gradient": worst}


def compiled(world: World, keys: dict[str, Any], sequence_parallel: bool) -> dict[str, float]:
    """Compare gradients of compiled blocks with those of the same blocks uncompiled."""
    unit, batch = make_unit(**keys), make_batch(packed=True)
    shared = make_parallel(world, unit, sequence_parallel=sequence_parallel)
    theirs = gradients(shared, batch, ROWS)
    expected = {name: weight.grad.clone() for name, weight in shared.weights() if weight.grad is not None}
    shared.drop_gradients()
    unit.compile_blocks()
    ours = gradients(shared, batch, ROWS)
    worst = max(difference(weight.grad, expected[name]) for name, weight in shared.weights() if name in expected)
    return {"loss": abs(ours / theirs - 1), "gradient": worst}


def train(world: World, keys: dict[str, Any], mode: str, values: dict[str, Any]) -> dict[str, Any]:
    """Compare three steps, by the step of the program, with those of one process; then a loss of one rank alone."""
    setting = sharing.Setting(**values)
    # Adam makes gradients that are 0 but for rounding as large as any other: in float64 that is still little
    keys = keys | {"recomputed": values.get("recomputation", "").replace("none", ""), "dtype": "float64"}
    alone = Parallel(make_unit(**keys))
    expected = sharing.run(alone, setting)
    parallel = make_parallel(world, make_unit(**keys), sequence_parallel=True, mode=mode)
    found = sharing.run(parallel, setting)
    numbers: dict[str, Any] = {
        name: max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(ours, theirs, strict=True))
        for name, ours, theirs in (
            ("loss", found.losses, expected.losses), ("norm", found.norms, expected.norms),
            ("largest", found.largest, expected.largest),
        )
    }  # fmt: skip
    assert found.clipped == expected.clipped
    for key, ours, theirs in (
        ("gradients", found.gradients, expected.gradients), ("weights", found.weights, expected.weights)
    ):  # fmt: skip
        numbers[key] = sharing.worst(ours, theirs)
    batch = make_batch(packed=True)
    with torch.no_grad():
        theirs = alone.unit.eval()(batch)["next_token"]
        with parallel.whole_weights():
            ours = parallel.unit.eval()(batch)["next_token"] if world.rank == world.size - 1 else theirs
        numbers["whole"] = difference(ours, theirs)
    own = [*found.losses, *found.norms, *found.largest]
    numbers["same"] = all(other == own for other in world.gather(own))
    return numbers
