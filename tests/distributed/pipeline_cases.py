"""Training in a pipeline beside one process, on every rank of a test's job."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from llmtrain.base.places import places_of
from llmtrain.base.world import World
from llmtrain.checkpoint.model_state import saved_tensors, stored_places
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.parts import model_parts, owned, state_parts
from llmtrain.data import Batch
from llmtrain.distributed.options import Distributed
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.pipeline import Pipeline
from llmtrain.objective import TrainingUnit
from llmtrain.train.step import Step, seed_step
from tests.distributed.sharing import CPU, make_precision
from tests.distributed.tensor_cases import FAMILIES, LENGTH, LR, ROWS, VOCABULARY, difference, make_batch, make_unit
from tests.helpers.adapted import seeded, stir
from tests.helpers.batches import batch_of
from tests.helpers.options import make_option


def make_pipeline(
    world: World, unit: TrainingUnit, schedule: str = "1f1b", stages: int = 1, replicate: int = 1, shard: int = 1
) -> Pipeline:
    """``unit`` in the stages of a pipeline."""
    degrees = (world.size // replicate // shard, replicate, shard, 1, 1)
    options: Distributed = make_option(
        "distributed", "pipeline", {}, pipeline_schedule=schedule, stages_per_process=stages
    )
    names = ("pipeline", "replicate", "shard", "context", "tensor")
    return Pipeline(unit, world, init_device_mesh("cpu", degrees, mesh_dim_names=names), options)


def make_step(parallel: Parallel, micro_batch_size: int, optimizer: str = "adamw", precision: str = "fp32") -> Step:
    option = make_option("optimizer", optimizer, {"lr": LR, "eps": 1e-4, "adamw_lr": LR})
    return Step(
        parallel.unit, option.build(parallel.trainable), make_precision(precision), micro_batch_size, parallel=parallel
    )


def batch_of_rank(parallel: Parallel, batch: Batch) -> Batch:
    return batch if parallel.data_size == 1 else batch.shard(parallel.data_rank, parallel.data_size)


Record = Callable[[str, Tensor, Tensor], None]


def compare(
    world: World, keys: dict[str, Any], packed: bool, micro: int, values: dict[str, Any], steps: int = 3
) -> dict[str, float]:
    """Compare steps with those of one process; return the worst relative differences."""
    settings = {"precision": "fp32", "optimizer": "adamw", "clipping": "norm"}
    settings |= {name: values.pop(name) for name in settings if name in values}
    precision, optimizer = settings["precision"], settings["optimizer"]
    alone = make_step(Parallel(make_unit(**keys)), micro, optimizer, precision)
    pipeline = make_pipeline(world, make_unit(**keys), **values)
    shared = make_step(pipeline, micro, optimizer, precision)
    common = {"start_step": 0, "max_norm": 0.3, "max_value": 0.1, "thresholds": {"norm": 0.01}}
    clip = make_option("clipping", settings["clipping"], common)
    worst: dict[str, float] = {}

    def record(key: str, ours: Tensor, theirs: Tensor) -> None:
        worst[key] = max(worst.get(key, 0.0), difference(ours, theirs))

    for number in range(steps):
        batch = make_batch(packed=packed, seed=number)
        ours, theirs = shared.gradients(batch_of_rank(pipeline, batch)), alone.gradients(batch)
        record("loss", ours.total, theirs.total)
        clips = shared.clip(clip, number), alone.clip(clip, number)
        record("norm", clips[0].norm, clips[1].norm)
        assert clips[0].largest is not None
        assert clips[1].largest is not None
        record("largest", clips[0].largest, clips[1].largest)
        assert bool(clips[0].clipped) == bool(clips[1].clipped)
        if number < 3:  # later ones are of weights that differ
            record_tensors(record, "gradient", pipeline, alone, lambda weight: weight.grad)
        for step, result in zip((shared, alone), clips, strict=True):
            step.update(LR, torch.zeros(()), result.divisor)
        if number == 2:
            record_tensors(record, "weight", pipeline, alone, lambda weight: weight.detach())
    check_calls(record, pipeline, alone.unit, make_batch(packed=packed, seed=9))
    assert world.is_first == ("logits" in worst)  # where whole weights are
    return worst


def record_tensors(
    record: Record, key: str, pipeline: Pipeline, alone: Step, tensor_of: Callable[[Tensor], Any]
) -> None:
    """Compare what ``tensor_of`` gives of this rank's parts with the same parts of one process."""
    places, others = pipeline.places(), dict(alone.weights)
    for name, weight in pipeline.weights():
        whole = tensor_of(others[name])
        (place,) = places_of(places[name])
        for dim, (begin, size) in enumerate(zip(place.offset, weight.shape, strict=True)):
            whole = whole.narrow(dim, begin if size else 0, size)
        if weight.numel():
            record(key, tensor_of(weight), whole)


def check_calls(record: Record, pipeline: Pipeline, alone: TrainingUnit, batch: Batch) -> None:
    """Compare the unit's own calls, without gradients."""
    part, unit = batch_of_rank(pipeline, batch), pipeline.unit
    for each in (unit, alone):
        each.eval()
    with torch.no_grad(), pipeline.scoring():
        found, counts = unit.score(part)
        assert counts is None
        for name, total in found.items():
            record("score", pipeline.sum_over_data(total), alone(batch)[name])
        rows = unit.sequence_losses(part)
        for name, losses in alone.sequence_losses(part).items():
            record("rows", rows[name], losses)
    with torch.no_grad(), pipeline.whole_weights():
        if pipeline.world.is_first:
            ours, theirs = (model(batch.tensors["inputs"])[..., :VOCABULARY] for model in (unit.model, alone.model))
            record("logits", ours, theirs)
    for each in (unit, alone):
        each.train()


def held(world: World, keys: dict[str, Any], values: dict[str, Any]) -> list[int]:
    """The elements that this rank holds, and those of the unit."""
    unit = make_unit(**keys)
    whole = sum(weight.numel() for _, weight in unit.named_weights())
    pipeline = make_pipeline(world, unit, **values)
    in_memory = sum(weight.numel() for weight in unit.parameters() if not weight.is_meta)
    assert in_memory == sum(weight.numel() for _, weight in pipeline.trainable.named_weights())
    return [in_memory, whole]


def boxes(world: World, keys: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The parts that this rank writes of model and optimizer: names, boxes and sums."""
    unit = make_unit(**keys)
    names = [name for name, _ in unit.named_weights()]
    pipeline = make_pipeline(world, unit, **values)
    optimizer = make_step(pipeline, 2).optimizer
    places = stored_places(unit, pipeline.places())
    model = saved_tensors(unit, pipeline.held(), pipeline.places())
    parts = owned(model_parts(model, places, is_first=world.is_first))
    state = owned(state_parts(state_tensors(optimizer), model, places, is_first=world.is_first))
    return {"names": names, "parts": sorted(parts), "state": sorted(state)}


def dropped(world: World, keys: dict[str, Any], values: dict[str, Any]) -> list[Any]:
    """Losses of two steps with dropout, and of the first again; the masks of this rank's first numbers."""
    unit = make_unit(**keys)
    step = make_step(make_pipeline(world, unit, **values), 2)
    losses = []
    for number in (0, 1, 0):
        seed_step(7, number, step.parallel.seed_rank)
        draws = torch.rand(3).tolist()
        losses.append(step.gradients(make_batch(seed=0)).total.item())
        step.drop_gradients()
    return [losses, draws]


def lengths(world: World, keys: dict[str, Any], values: dict[str, Any]) -> dict[str, float]:
    """Steps of other numbers of rows and tokens, one after the other, beside one process."""
    alone = make_step(Parallel(make_unit(**keys)), 2)
    shared = make_step(make_pipeline(world, make_unit(**keys), **values), 2)
    worst: dict[str, float] = {}
    for number, (rows, tokens) in enumerate([(6, 14), (5, 9), (1, 14), (6, 14), (3, 5)]):
        batch = make_batch(seed=number).map(lambda tensor, r=rows, t=tokens: tensor[:r, :t])  # type: ignore[misc]
        count = int((batch.tensors["targets"] != -100).sum())
        row_lengths = {name: tuple(max(1, tokens - 2 * row) for row in range(rows)) for name in batch.tensors}
        batch = Batch(batch.tensors, dict.fromkeys(batch.counts, count), batch.tokens, row_lengths)
        for row, length in enumerate(row_lengths["targets"]):
            batch.tensors["targets"][row, length:] = -100
        ours, theirs = shared.gradients(batch), alone.gradients(batch)
        worst[f"{rows}x{tokens}"] = difference(ours.total, theirs.total)
        others = dict(alone.weights)
        for name, weight in shared.weights:
            gradient, other = weight.grad, others[name].grad
            assert gradient is not None
            assert other is not None
            worst[f"{rows}x{tokens}"] = max(worst[f"{rows}x{tokens}"], difference(gradient, other))
        shared.drop_gradients()
        alone.drop_gradients()
    return worst


def classify(world: World, values: dict[str, Any]) -> dict[str, Any]:
    """The loss, gradients and counted classes of a classifier, beside one process."""
    units = []
    for _ in range(2):
        model = make_option("model", "llama_tiny", FAMILIES["llama_tiny"]).create(VOCABULARY, CPU, seeded())
        objective = make_option("objective", "classification", {}, train="all", multi_label=False)
        units.append(objective.build(model, ("a", "b", "c"), seeded()))
        stir(units[-1])
    targets = torch.full((ROWS, LENGTH), -100)
    targets[:, LENGTH - 2] = torch.arange(ROWS) % 3
    batch = batch_of(make_batch().tensors["inputs"], targets, objective=objective)
    alone, shared = make_step(Parallel(units[0]), 2), make_step(make_pipeline(world, units[1], **values), 2)
    worst: dict[str, float] = {}

    def record(key: str, ours: Tensor, theirs: Tensor) -> None:
        worst[key] = max(worst.get(key, 0.0), difference(ours, theirs))

    record("loss", shared.gradients(batch).total, alone.gradients(batch).total)
    parallel = shared.parallel
    assert isinstance(parallel, Pipeline)
    record_tensors(record, "gradient", parallel, alone, lambda weight: weight.grad)
    with torch.no_grad(), parallel.scoring():
        _, counts = units[1].score(batch)
        assert counts is not None
        found, expected = parallel.sum_over_data(counts), units[0].score(batch)[1]
    assert expected is not None
    return {"worst": worst, "counts": found.tolist() == expected.tolist()}
