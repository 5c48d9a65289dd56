"""Context parallelism: loss, gradients, norm and three steps as in one process; work and memory shared evenly."""

from typing import Any

import pytest

from llmtrain.distributed.checks import check_context
from llmtrain.distributed.options import Mesh
from llmtrain.distributed.share import with_context_as_data
from tests.distributed.context_cases import (
    compare,
    compiled,
    drop,
    generate,
    kept_bytes,
    low_precision,
    owners,
    pairs_and_positions,
    scores,
    train,
)
from tests.distributed.test_tensor import GPT, LLAMA, UNITS
from tests.helpers.options import make_option
from tests.helpers.ranks import Ranks

TOLERANCE = 1e-5
CONTEXT = {"context": 2}
OF_CONTEXT = UNITS | {
    "llama sliding window": LLAMA | {"sliding_window": 4, "sliding_window_from_layer": 1, "tie_embeddings": False},
    "llama dynamic positions": LLAMA | {
        "rope_scaling": "dynamic", "rope_factor": 2.0, "rope_original_context_length": 8
    },
}  # fmt: skip


def check(ranks: Ranks, *arguments: Any, tolerance: float = TOLERANCE) -> None:
    for worst in ranks.run(compare, *arguments):
        assert max(worst.values()) < tolerance, (arguments, worst)


@pytest.mark.parametrize("unit", OF_CONTEXT)
def test_steps_are_those_of_one_process(two: Ranks, unit: str) -> None:
    check(two, OF_CONTEXT[unit], CONTEXT)


@pytest.mark.parametrize(
    "unit", ["gpt tied", "llama grouped queries", "llama alibi, normalised head", "llama sliding window"]
)
def test_packed_segments_in_micro_batches_are_those_of_one_process(two: Ranks, unit: str) -> None:
    check(two, OF_CONTEXT[unit], CONTEXT, True, 4)


@pytest.mark.parametrize("unit", ["gpt softcap z-loss", "dora llama", "llama sliding window"])
def test_steps_in_float64_are_the_same_but_for_rounding(two: Ranks, unit: str) -> None:
    check(two, OF_CONTEXT[unit] | {"dtype": "float64"}, CONTEXT, True, 2, tolerance=1e-12)


@pytest.mark.parametrize("unit", ["gpt tied", "lora llama", "llama recomputed operations"])
def test_weights_are_divided_over_the_ranks_of_a_context(two: Ranks, unit: str) -> None:
    check(two, OF_CONTEXT[unit] | {"dtype": "float64"}, CONTEXT | {"shard": -1}, True, 2, tolerance=1e-10)


@pytest.mark.parametrize(("optimizer", "shard"), [("muon", -1), ("adafactor", 1), ("lion", -1), ("sgd", 1)])
def test_optimizers_and_clippings_work_with_shared_positions(two: Ranks, optimizer: str, shard: int) -> None:
    settings = {"optimizer": optimizer, "clipping": "per_parameter" if optimizer == "sgd" else "norm"}
    for found in two.run(train, UNITS["llama fused qkv"] | {"qkv_bias": False}, CONTEXT | {"shard": shard}, settings):
        assert found.pop("same"), found
        assert max(found.values()) < TOLERANCE, found


def test_evaluation_is_that_of_one_process_on_each_rank(two: Ranks) -> None:
    for unit in ("gpt softcap z-loss", "llama grouped queries"):
        for found in two.run(scores, UNITS[unit]):
            assert found.pop("same")
            assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("unit", ["gpt tied", "llama alibi, normalised head"])
def test_one_rank_alone_samples_text(two: Ranks, unit: str) -> None:
    for alone, before, after in two.run(generate, UNITS[unit]):
        assert len(alone) == 8
        assert alone == before == after


def test_dropout_differs_by_rank_and_gradients_do_not(two: Ranks) -> None:
    first, second = two.run(drop, UNITS["gpt tied"] | {"dropout": 0.2, "recomputed": "full"})
    assert first["mask"] != second["mask"]
    assert first["sums"] == second["sums"]
    assert first["loss"] == second["loss"] != first["plain"]


def test_errors_in_bf16_are_those_of_one_process(two: Ranks) -> None:
    for errors in two.run(low_precision, UNITS["llama grouped queries"]):
        assert errors["loss"] < 2e-3
        assert errors["shared"] < 1.2 * errors["alone"], errors


def test_ranks_attend_to_as_many_pairs_and_have_every_position_once(two: Ranks) -> None:
    found = two.run(pairs_and_positions, 32)
    assert found[0]["pairs"] == found[1]["pairs"] == 32 * 33 // 4
    assert found[0]["computed"] == found[1]["computed"]
    assert sorted(found[0]["positions"] + found[1]["positions"]) == list(range(32))


@pytest.mark.parametrize("unit", ["gpt tied", "llama grouped queries"])
def test_activations_take_half_of_the_memory(two: Ranks, unit: str) -> None:
    keys = UNITS[unit] | {"num_layers": 4}
    (alone, _), (first, second) = (two.run(kept_bytes, keys, 512, shared) for shared in (False, True))
    print(unit, alone, first, second)
    assert 0.45 * alone < first <= second < 0.65 * alone


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(two: Ranks) -> None:
    for worst in two.run(compiled, GPT | {"num_layers": 1, "qkv_bias": True}, timeout_seconds=500):
        assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [
        {"context": 4},
        {"context": 2, "replicate": 2},
        {"context": 2, "shard": 2},
        {"context": 2, "tensor": 2},
        {"context": 2, "tensor": 2, "shard": -1},
    ],
    ids=str,
)
def test_four_ranks_are_one_process(four: Ranks, degrees: dict[str, int]) -> None:
    for unit in ("gpt tied", "llama grouped queries", "lora"):
        check(four, UNITS[unit] | {"dtype": "float64"}, degrees, True, 2, tolerance=1e-10)
    if {"tensor", "shard"} & degrees.keys():
        assert four.run(owners, UNITS["llama grouped queries"], degrees) == [[]] * 4


MESH = Mesh(context=4, shard=2)
CAUSAL = make_option("objective", "causal", {})


def test_what_fits_is_taken() -> None:
    check_context(MESH, CAUSAL, 1024)
    check_context(MESH, make_option("objective", "instruction", {}), 1000)
    check_context(Mesh(shard=8), make_option("objective", "classification", {"multi_label": False}), 1001)
    check_context(Mesh(context=2, tensor=2), CAUSAL, 1024)


@pytest.mark.parametrize(
    ("mesh", "objective", "length", "message"),
    [
        (MESH, "causal", 1001, r"data\.sequence_length=1001: distributed\.context=4 .* 8 chunks .*=1000, or another"),
        (MESH, "causal", 4, r"data\.sequence_length=4: .* take data\.sequence_length=8"),
        (MESH, "classification", 1024, r"objective=classification: .*; take distributed\.context=1"),
        (Mesh(context=2, pipeline=2), "causal", 64, r"distributed\.context=2: does not go with .*pipeline=2"),
    ],
)
def test_what_does_not_fit_is_refused(mesh: Mesh, objective: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_context(mesh, make_option("objective", objective, {"multi_label": False}), length)


def test_weights_are_divided_where_shard_takes_what_is_left() -> None:
    fsdp, ddp = (make_option("distributed", name, {}, context=2) for name in ("fsdp", "ddp"))
    assert fsdp.mesh(2) == Mesh(context=2)
    assert fsdp.is_sharded(fsdp.mesh(2))
    assert not ddp.is_sharded(ddp.mesh(4))
    assert not fsdp.is_sharded(Mesh())
    assert with_context_as_data(Mesh(replicate=2, context=2), is_sharded=False) == Mesh(replicate=4)
    assert with_context_as_data(Mesh(replicate=2, shard=2, context=2), is_sharded=True) == Mesh(replicate=2, shard=4)
