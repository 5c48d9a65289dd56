"""The other promises of ranks that share a unit: names, boxes, evaluation, samples, errors, bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from llmtrain.base.world import World
from llmtrain.distributed.checks import ParallelSettings, check_parallel
from llmtrain.distributed.data_parallel import Sharded
from llmtrain.distributed.parallel import Parallel
from llmtrain.train.out_of_memory import RankOutOfMemory
from tests.distributed.sharing import (
    CPU,
    LENGTH,
    VOCABULARY,
    Setting,
    make_batch,
    make_precision,
    make_step,
    make_unit,
    run,
    share,
    worst,
    worst_norm,
)
from tests.helpers.options import make_option
from tests.helpers.ranks import Ranks

MODES = ("ddp", "fsdp")


# --- names and boxes ------------------------------------------------------------------------------------------------


def describe(world: World, kind: str) -> dict[str, Any]:
    """Names, boxes and values of the weights that this rank holds."""
    alone, parallel = make_unit(kind), share(make_unit(kind), world, "fsdp")
    expected, places = dict(alone.named_weights()), parallel.places()
    view = parallel.trainable
    weights = dict(view.named_weights())
    same_values = []
    for name, weight in weights.items():
        box = expected[name].detach()
        for dim, (begin, size) in enumerate(zip(places[name].offset, weight.shape, strict=True)):
            box = box.narrow(dim, min(begin, box.shape[dim] - size), size)
        same_values.append(torch.equal(box, weight.detach()) and places[name].whole == tuple(expected[name].shape))
    return {
        "names": list(weights) == list(expected),
        "trained": [name for name, _ in parallel.weights()] == [name for name, _ in alone.trained_weights()],
        "plain": all(type(weight) is torch.nn.Parameter for weight in weights.values()),
        "frozen": [w.requires_grad for w in weights.values()] == [w.requires_grad for w in expected.values()],
        "layers": all(view.layer_index(name) == alone.layer_index(name) for name in weights),
        "values": all(same_values),
        "owned": sum(weights[name].numel() for name, place in places.items() if place.is_owner),
        "elements": sum(weight.numel() for weight in expected.values()),
        "empty": [name for name, weight in weights.items() if not weight.numel()],
        "buffers": all(not type(b).__name__.startswith("DTensor") for b in parallel.unit.buffers()),
    }


@pytest.mark.parametrize("kind", ["gpt", "llama", "gpt lora"])
def test_weights_are_the_boxes_of_the_unit_by_name(two: Ranks, kind: str) -> None:
    both = two.run(describe, kind)
    for found in both:
        assert all(found[key] for key in ("names", "trained", "plain", "frozen", "layers", "values", "buffers")), found
    assert sum(found["owned"] for found in both) == both[0]["elements"]
    assert not both[0]["empty"]
    assert any("lora_A" in name for name in both[1]["empty"]) == (kind == "gpt lora")


def own_memory(world: World) -> list[bool]:
    """True where an update in place reaches the unit's own weights, and gradients are in the unit's memory."""
    parallel = share(make_unit("gpt"), world, "fsdp")
    assert isinstance(parallel, Sharded)
    step = make_step(parallel, Setting())
    step.gradients(make_batch(4, 0).shard(world.rank, 2))
    shares = []
    for shard in parallel.shards.shards.values():
        whole_weight: Any = shard.whole
        shares.append(shard.local.data_ptr() == whole_weight.to_local().data_ptr())
        assert shard.local.grad is not None
        shares.append(shard.local.grad.data_ptr() == whole_weight.grad.to_local().data_ptr())
    step.drop_gradients()
    return [*shares, all(parameter.grad is None for parameter in parallel.unit.parameters())]


def test_parts_share_the_memory_of_the_unit(two: Ranks) -> None:
    assert all(all(shares) for shares in two.run(own_memory))


# --- the step -------------------------------------------------------------------------------------------------------


def flags(world: World, mode: str) -> list[Any]:
    parallel = share(make_unit("gpt"), world, mode)
    step = make_step(parallel, Setting())
    batch = make_batch(4, 0, targets="uneven").shard(parallel.data_rank, 2)
    loss = step.gradients(batch, torch.tensor([1.0, float(world.rank)]))
    assert loss.flags is not None
    return [loss.flags.tolist(), loss.total.item(), sum(part.item() for part in loss.parts.values())]


@pytest.mark.parametrize("mode", MODES)
def test_flags_are_summed_with_the_losses(two: Ranks, mode: str) -> None:
    first, second = two.run(flags, mode)
    assert first == second
    assert first[0] == [2.0, 1.0]
    assert first[1] == pytest.approx(first[2])


def test_one_process_gets_its_flags_back() -> None:
    step, given = make_step(Parallel(make_unit("gpt")), Setting()), torch.ones(2)
    assert step.gradients(make_batch(2, 0), given).flags is given


def sum_copies(world: World) -> list[Any]:
    """The sums of losses of ranks that have the same sequences, as those of a tensor-parallel group do."""
    losses, summed = Parallel(make_unit("gpt"), world).sum_losses(torch.tensor([2.0, 3.0]), torch.ones(1))
    assert summed is not None
    return [losses.tolist(), summed.tolist()]


def test_losses_of_ranks_with_the_same_sequences_count_once(two: Ranks) -> None:
    assert two.run(sum_copies) == [[[2.0, 3.0], [2.0]]] * 2


def not_finite(world: World, mode: str, clipping: str) -> list[bool]:
    """Return whether norm and largest element tell of a NaN in the last row of a gradient: on one rank, if sharded."""
    parallel = share(make_unit("gpt"), world, mode)
    step = make_step(parallel, Setting())
    step.gradients(make_batch(4, 0).shard(parallel.data_rank, 2))
    gradient = dict(step.weights)["blocks.1.mlp.up.weight"].grad
    assert gradient is not None
    if mode == "ddp" or world.rank == 1:
        gradient.view(-1)[-1] = torch.nan
    common = {"start_step": 0, "max_norm": 1.0, "max_value": 0.1}
    clip = step.clip(make_option("clipping", clipping, common), 0)
    assert clip.largest is not None
    return [bool(clip.norm.isnan()), bool(clip.largest.isnan())]


@pytest.mark.parametrize("clipping", ["norm", "value"])
@pytest.mark.parametrize("mode", MODES)
def test_nan_on_one_rank_is_known_to_all(two: Ranks, mode: str, clipping: str) -> None:
    assert two.run(not_finite, mode, clipping) == [[True, True]] * 2


def skipped(world: World, optimizer: str) -> bool:
    return skipped_by(world, "fsdp", optimizer)


def skipped_by(world: World, mode: str, optimizer: str) -> bool:
    """True if a refused step changes no part of a weight."""
    parallel = share(make_unit("gpt"), world, mode)
    step = make_step(parallel, Setting(optimizer=optimizer))
    before = {name: weight.detach().clone() for name, weight in step.weights}
    step.gradients(make_batch(4, 0).shard(world.rank, 2))
    step.update(0.1, torch.ones(()))
    return all(torch.equal(before[name], weight) for name, weight in step.weights)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_skipped_step_changes_no_shard(two: Ranks, optimizer: str) -> None:
    assert two.run(skipped, optimizer) == [True, True]


def run_out(world: World) -> str:
    """The message of a rank whose memory runs out in its first micro-batch; no exchange has begun."""
    parallel = share(make_unit("gpt"), world, "ddp")
    step = make_step(parallel, Setting(micro_batch_size=4))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    parallel.unit.model.blocks[0].register_forward_pre_hook(fail)
    try:
        step.gradients(make_batch(8, 0).shard(world.rank, 2))
    except RankOutOfMemory as error:
        return str(error)
    return ""


def test_out_of_memory_names_rank_and_key(two: Ranks) -> None:
    for rank, message in enumerate(two.run(run_out)):
        assert message == (
            f"accumulation.micro_batch_size=4: memory ran out on rank {rank} (localhost): "
            "CUDA out of memory. Tried to allocate 2 GiB; take accumulation.micro_batch_size=2"
        )


def low_precision(world: World, mode: str) -> float:
    """The worst difference of gradients in bf16, of several micro-batches, from those of one process."""
    setting = Setting(precision="bf16", micro_batch_size=1, steps=1, optimizer="sgd", sequences=6)
    alone = run(Parallel(make_unit("gpt")), setting)
    return worst(run(share(make_unit("gpt"), world, mode), setting).gradients, alone.gradients)


@pytest.mark.parametrize("mode", MODES)
def test_bf16_with_several_micro_batches_is_that_of_one_process(two: Ranks, mode: str) -> None:
    assert max(two.run(low_precision, mode)) < 1e-2


def dropout(world: World, mode: str) -> bool:
    """True if gradients with dropout are the same to the bit with recomputation."""
    found = []
    for recomputation in ("none", "full"):
        parallel = share(make_unit("gpt", recomputation=recomputation, dropout=0.2), world, mode)
        torch.manual_seed(world.rank)
        found.append(run(parallel, Setting(steps=2)).weights)
    return all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_repeats_dropout(two: Ranks, mode: str) -> None:
    assert two.run(dropout, mode) == [True, True]


# --- evaluation and samples -----------------------------------------------------------------------------------------


def score(world: World, mode: str, precision: str) -> list[float]:
    """Differences of scores and of losses by sequence from one process, between steps of training."""
    alone, parallel = make_unit("gpt"), share(make_unit("gpt"), world, mode)
    batch = make_batch(3, 9, targets="uneven")
    steps = [make_step(Parallel(alone), Setting()), make_step(parallel, Setting())]
    arithmetic, found = make_precision(precision), []
    for number in range(2):
        numbers = []
        for unit, step in zip((alone, parallel.unit), steps, strict=True):
            unit.eval()
            with torch.no_grad(), step.parallel.scoring(), arithmetic.autocast():
                sums, _ = unit.score(batch)
                rows = unit.sequence_losses(batch)["next_token"]
            unit.train()
            numbers.append(torch.cat([sums["next_token"][None], rows]))
        found.append(float(((numbers[0] - numbers[1]) / numbers[0].abs().clamp(min=1e-3)).abs().max()))
        whole_batch = make_batch(4, number)
        for step in steps:
            size = step.parallel.data_size
            step.gradients(whole_batch.shard(step.parallel.data_rank, size) if size > 1 else whole_batch)
            step.update(0.01, torch.zeros(()))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_scores_are_those_of_one_process(two: Ranks, mode: str, precision: str) -> None:
    limit = 1e-5 if precision == "fp32" else 1e-3
    assert max(max(found) for found in two.run(score, mode, precision)) < limit


def sample(world: World, mode: str, first: bool) -> list[bool]:
    """True where rank 0's logits, of the model called by it alone, are those of one process; then training goes on."""
    alone, parallel = make_unit("gpt"), share(make_unit("gpt"), world, mode)
    setting = Setting(steps=2)
    if not first:
        run(Parallel(alone), setting)
        run(parallel, setting)
    ids = torch.arange(LENGTH)[None] % VOCABULARY
    close = []
    with parallel.whole_weights():
        if world.rank == 0:
            with torch.inference_mode():
                for length in (3, LENGTH):  # not equally many calls
                    expected, found = (unit.model(ids[:, :length]) for unit in (alone, parallel.unit))
                    close.append(torch.allclose(found, expected, rtol=1e-4, atol=1e-4))
    weights = [run(each, setting).weights for each in (Parallel(alone), parallel)]
    local = sum(parameter.numel() for _, parameter in parallel.weights())
    is_sharded = mode == "ddp" or local < 0.6 * sum(weight.numel() for weight in weights[0].values())
    return [*close, worst_norm(weights[1], weights[0]) < 1e-4, is_sharded]


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_samples_alone_between_steps(two: Ranks, mode: str) -> None:
    assert all(all(found) for found in two.run(sample, mode, False))


def test_one_rank_samples_before_the_first_step(two: Ranks) -> None:
    assert all(all(found) for found in two.run(sample, "fsdp", True))


def resharded_after_evaluation(world: World) -> bool:
    """True if weights that are loaded after an evaluation are those of the next forward pass."""
    parallel = share(make_unit("gpt"), world, "fsdp")
    batch = make_batch(2, 0)
    with torch.no_grad(), parallel.scoring():
        before = parallel.unit.score(batch)[0]["next_token"]
    with torch.no_grad():
        for _, weight in parallel.weights():
            weight.mul_(0.5)
    with torch.no_grad(), parallel.scoring():
        after = parallel.unit.score(batch)[0]["next_token"]
    alone = make_unit("gpt")
    alone.load_weights({name: 0.5 * tensor for name, tensor in make_unit("gpt").weights_state().items()}, strict=False)
    with torch.no_grad():
        return not torch.equal(before, after) and torch.allclose(after, alone.score(batch)[0]["next_token"])


def test_weights_loaded_after_an_evaluation_are_used(two: Ranks) -> None:
    assert two.run(resharded_after_evaluation) == [True, True]


def materialise(world: World) -> bool:
    """True if a unit that was sharded without data trains as one that had them."""
    weights = dict(make_unit("gpt").named_weights())
    with torch.device("meta"):
        unit = make_unit("gpt")
    parallel = share(unit.to("meta"), world, "fsdp")
    assert isinstance(parallel, Sharded)
    unit.to_empty(device=CPU)
    for name, buffer in make_unit("gpt").named_buffers():
        unit.get_buffer(name).copy_(buffer)
    for name, shard in parallel.shards.shards.items():
        with torch.no_grad():
            shard.local.copy_(shard.own_part(weights[name]))
    expected = run(Parallel(make_unit("gpt")), Setting(optimizer="sgd"))
    return worst(run(parallel, Setting(optimizer="sgd")).weights, expected.weights) < 1e-5


def test_unit_is_sharded_before_it_has_memory(two: Ranks) -> None:
    assert two.run(materialise) == [True, True]


# --- refusals -------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> ParallelSettings:
    common = {"lr": 0.1, "start_step": 0}
    plain = ParallelSettings(
        processes=2,
        is_sharded=True,
        optimizer=make_option("optimizer", "adamw", common),
        clipping=make_option("clipping", "norm", common),
        precision=make_option("precision", "fp32", {}),
        lora=make_option("lora", "none", {}),
        activation_checkpointing=make_option("activation_checkpointing", "full", {}),
        cuda_graphs=False,
    )
    return replace(plain, **changes)


REFUSED = {
    "optimizer=adafactor": {"optimizer": ("optimizer", "adafactor", {})},
    "optimizer=adamw_8bit": {"optimizer": ("optimizer", "adamw_8bit", {})},
    "precision=fp8": {"precision": ("precision", "fp8", {})},
    "lora.quantization=nf4": {"lora": ("lora", "lora", {"quantization": "nf4"})},
    "activation_checkpointing.offload=True": {
        "activation_checkpointing": ("activation_checkpointing", "full", {"offload": True})
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_need_whole_weights_are_refused_with_a_remedy(message: str) -> None:
    changes = {
        key: make_option(group, name, {"lr": 0.1}, **keys) for key, (group, name, keys) in REFUSED[message].items()
    }
    with pytest.raises(ValueError, match=f"{message}: .*; take .*distributed=ddp"):
        check_parallel(settings(**changes))
    check_parallel(settings(**changes, is_sharded=False))


def test_cuda_graphs_with_several_processes_are_refused() -> None:
    check_parallel(settings())
    check_parallel(settings(cuda_graphs=True, processes=1))
    with pytest.raises(ValueError, match=r"runtime\.cuda_graphs=True: .*; take runtime\.cuda_graphs=false"):
        check_parallel(settings(cuda_graphs=True, is_sharded=False))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "lion", "muon", "adamw_bf16"])
@pytest.mark.parametrize("clipping", ["norm", "value", "per_parameter", "none"])
def test_the_usual_settings_are_taken(optimizer: str, clipping: str) -> None:
    changes = {"optimizer": make_option("optimizer", optimizer, {"lr": 0.1})}
    check_parallel(settings(**changes, clipping=make_option("clipping", clipping, {"start_step": 0})))


def refuse_packed(world: World) -> str:
    try:
        share(make_unit("gpt lora bf16"), world, "fsdp")
    except ValueError as error:
        return str(error)
    return ""


def test_packed_weights_are_refused_by_sharding(two: Ranks) -> None:
    for message in two.run(refuse_packed):
        assert "take lora.quantization=none, or distributed=ddp" in message
