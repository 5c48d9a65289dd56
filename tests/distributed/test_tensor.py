"""Tensor parallelism: loss, gradients, norm and three steps as in one process."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.tensor_cases import (
    boxes,
    classify,
    compare,
    compiled,
    drop,
    generate,
    low_precision,
    scores,
    train,
)
from tests.helpers.ranks import Ranks

TOLERANCE = 1e-5

GPT: dict[str, Any] = {"family": "tiny"}
LLAMA: dict[str, Any] = {"family": "llama_tiny", "num_kv_heads": 2}
UNITS: dict[str, dict[str, Any]] = {
    "gpt tied": GPT | {"tie_embeddings": True, "qkv_bias": True},
    "gpt untied": GPT | {"tie_embeddings": False, "qkv_bias": False},
    "gpt softcap z-loss": GPT | {"logit_softcap": 3.0, "z_loss": 1e-2},
    "llama grouped queries": LLAMA | {"tie_embeddings": False},
    "llama all biases": LLAMA | {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "llama fused qkv": LLAMA | {"fused_qkv": True, "qkv_bias": True},
    "llama qk norm": LLAMA | {"qk_norm": True},
    "llama alibi, normalised head": LLAMA | {
        "position": "alibi", "rope_theta": None, "normalised_head": True, "num_kv_heads": 4, "tie_embeddings": False
    },
    "lora": GPT | {"lora": "lora", "targets": ["all-linear", "embeddings"], "qkv_bias": True},
    "lora llama": LLAMA | {"lora": "lora", "targets": ["all-linear", "head"], "tie_embeddings": False},
    "dora llama": LLAMA | {
        "lora": "dora", "targets": ["all-linear", "head", "embeddings"], "tie_embeddings": False, "output_bias": True
    },
    "gpt recomputed": GPT | {"recomputed": "full"},
    "llama recomputed operations": LLAMA | {"recomputed": "selective"},
}  # fmt: skip


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def check(ranks: Ranks, *arguments: Any, tolerance: float = TOLERANCE) -> None:
    for worst in ranks.run(compare, *arguments):
        assert max(worst.values()) < tolerance, worst


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize("unit", UNITS)
def test_steps_are_those_of_one_process(two: Ranks, unit: str, sequence_parallel: bool) -> None:
    check(two, UNITS[unit], False, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize("unit", ["gpt tied", "llama grouped queries"])
def test_packed_segments_in_micro_batches_are_those_of_one_process(
    two: Ranks, unit: str, sequence_parallel: bool
) -> None:
    check(two, UNITS[unit], True, sequence_parallel, 4)


@pytest.mark.parametrize("unit", ["gpt softcap z-loss", "llama all biases", "dora llama"])
def test_steps_in_float64_are_the_same_but_for_rounding(two: Ranks, unit: str) -> None:
    check(two, UNITS[unit] | {"dtype": "float64"}, True, True, 2, tolerance=1e-12)


@pytest.mark.parametrize("unit", ["gpt tied", "llama fused qkv", "llama alibi, normalised head", "dora llama"])
def test_boxes_of_the_ranks_make_the_whole_once(two: Ranks, unit: str) -> None:
    for found in two.run(boxes, UNITS[unit]):
        assert found["wrong"] == []
        assert 0 < found["cut"] < found["names"]
        assert found["several"] == (
            4 if unit in ("gpt tied", "llama fused qkv") else 0
        )  # weight and bias of two blocks


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize("unit", ["gpt tied", "llama grouped queries", "llama alibi, normalised head", "dora llama"])
def test_sampled_text_is_that_of_one_process(two: Ranks, unit: str, sequence_parallel: bool) -> None:
    for alone, together, first, again in two.run(generate, UNITS[unit], sequence_parallel):
        assert len(alone) == 8
        assert together == alone
        assert first == alone
        assert again == alone


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
def test_evaluation_is_that_of_one_process(two: Ranks, sequence_parallel: bool) -> None:
    for unit in ("gpt softcap z-loss", "llama grouped queries"):
        assert max(two.run(scores, UNITS[unit], sequence_parallel)) < TOLERANCE


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
def test_errors_in_bf16_are_those_of_one_process(two: Ranks, sequence_parallel: bool) -> None:
    for errors in two.run(low_precision, UNITS["llama grouped queries"], sequence_parallel):
        assert errors["loss"] < 2e-3
        assert errors["shared"] < 1.2 * errors["alone"], errors


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
def test_ranks_agree_with_dropout(two: Ranks, sequence_parallel: bool) -> None:
    first, second = two.run(drop, UNITS["gpt tied"] | {"dropout": 0.2, "recomputed": "full"}, sequence_parallel)
    assert first == second
    assert first["loss"] != first["plain"]


def test_classifier_is_that_of_one_process(two: Ranks) -> None:
    for worst in two.run(classify):
        assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(two: Ranks) -> None:
    keys = GPT | {"num_layers": 1, "qkv_bias": True}
    for worst in two.run(compiled, keys, True, timeout_seconds=500):
        assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("optimizer", ["muon", "lion", "sgd", "adamw"])
def test_optimizers_and_clippings_work_on_parts(two: Ranks, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "clipping": "per_parameter" if optimizer == "sgd" else "norm"}
    for found in two.run(train, UNITS["llama fused qkv"] | {"qkv_bias": False}, "tensor", settings):
        assert found.pop("same"), found
        assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_tensor_groups_share_a_unit_in_other_ways(mode: str) -> None:
    with Ranks(4) as ranks:
        for unit, settings in (
            ("gpt untied", {}),
            ("llama fused qkv", {"optimizer": "muon"}),
            ("lora llama", {"recomputation": "full"}),
        ):
            for found in ranks.run(train, UNITS[unit] | {"qkv_bias": False}, mode, settings):
                assert found.pop("same"), (unit, found)
                assert max(found.values()) < TOLERANCE, (unit, found)
            for parts in ranks.run(boxes, UNITS[unit], mode):
                assert parts["wrong"] == [], unit


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
def test_four_ranks_are_one_process(sequence_parallel: bool) -> None:
    with Ranks(4) as four:
        for unit in ("gpt tied", "llama alibi, normalised head", "lora"):
            check(four, UNITS[unit], True, sequence_parallel, 4)
        check(four, UNITS["dora llama"] | {"num_kv_heads": 4, "fused_qkv": True}, True, sequence_parallel, 4)


@pytest.mark.slow
def test_three_ranks_share_a_vocabulary_that_three_does_not_divide() -> None:
    with Ranks(3) as three:
        for unit in ("gpt tied", "lora"):
            keys = UNITS[unit] | {"num_heads": 6, "hidden_size": 36}
            check(three, keys, True, True, 4)
            for found in three.run(boxes, keys):
                assert found["wrong"] == []
            for alone, together, *_ in three.run(generate, keys, False):
                assert together == alone
