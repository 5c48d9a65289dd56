"""Pipelines: losses, gradients, norms and weights as in one process, by every schedule."""

from typing import Any

import pytest

from tests.distributed.pipeline_cases import boxes, classify, compare, dropped, held, lengths
from tests.helpers.ranks import Ranks

TOLERANCE = 1e-5
GPT: dict[str, Any] = {"family": "tiny", "tie_embeddings": True, "num_layers": 4}
LLAMA: dict[str, Any] = {"family": "llama_tiny", "num_kv_heads": 2, "tie_embeddings": False, "num_layers": 4}
LORA: dict[str, Any] = LLAMA | {"lora": "lora", "targets": ["all-linear"]}
SCHEDULES: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "interleaved": {"schedule": "interleaved", "stages": 2},
    "zero_bubble": {"schedule": "zero_bubble", "stages": 2},
}  # fmt: skip


def check(ranks: Ranks, *arguments: Any, tolerance: float = TOLERANCE) -> None:
    for worst in ranks.run(compare, *arguments):
        assert max(worst.values()) < tolerance, worst


def check_forty_steps(ranks: Ranks, keys: dict[str, Any], values: dict[str, Any]) -> None:
    for worst in ranks.run(compare, keys, False, 1, values, 40, timeout_seconds=600):
        print(values, {key: f"{worst[key]:.1e}" for key in ("loss", "norm")})
        assert max(worst["loss"], worst["norm"]) < TOLERANCE, worst


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("keys", [GPT, LLAMA, LORA], ids=["gpt tied", "llama grouped queries", "lora"])
def test_steps_are_those_of_one_process(two: Ranks, keys: dict[str, Any], schedule: str) -> None:
    check(two, keys, False, 2, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_packed_segments_are_those_of_one_process(two: Ranks, schedule: str) -> None:
    check(two, GPT, True, 1, SCHEDULES[schedule])
    check(two, LLAMA, True, 2, SCHEDULES[schedule])


@pytest.mark.parametrize(("schedule", "recomputed"), [("1f1b", "full"), ("1f1b", "selective"), ("zero_bubble", "full")])
def test_recomputation_works_within_a_stage(two: Ranks, schedule: str, recomputed: str) -> None:
    check(two, GPT | {"recomputed": recomputed}, False, 2, SCHEDULES[schedule])


@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "lion"])
def test_optimizers_train_whole_parameters_of_a_stage(two: Ranks, optimizer: str) -> None:
    check(two, LLAMA, False, 2, {"optimizer": optimizer})


@pytest.mark.parametrize("clipping", ["per_parameter", "value", "adaptive"])
def test_clippings_agree_over_the_stages(two: Ranks, clipping: str) -> None:
    check(two, GPT, False, 2, {"clipping": clipping})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bf16_trains_as_one_process(two: Ranks, schedule: str) -> None:
    check(two, LLAMA, False, 2, SCHEDULES[schedule] | {"precision": "bf16"}, tolerance=2e-2)


def test_a_classifier_is_trained_and_scored(two: Ranks) -> None:
    for found in two.run(classify, {"schedule": "1f1b"}):
        assert max(found["worst"].values()) < TOLERANCE, found
        assert found["counts"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_of_any_number_of_rows_and_tokens_run(two: Ranks, schedule: str) -> None:
    for worst in two.run(lengths, GPT, SCHEDULES[schedule]):
        assert max(worst.values()) < TOLERANCE, worst


def test_a_rank_holds_its_stages_alone(two: Ranks) -> None:
    found = two.run(held, LLAMA | {"vocab_size": 64, "num_layers": 8}, {"schedule": "1f1b"})
    whole = found[0][1]
    assert sum(own for own, _ in found) == whole
    assert all(0.4 * whole < own < 0.6 * whole for own, _ in found), found


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
@pytest.mark.parametrize("keys", [GPT, LORA], ids=["gpt tied", "lora"])
def test_every_tensor_is_written_once(two: Ranks, keys: dict[str, Any], schedule: str) -> None:
    first, second = two.run(boxes, keys, SCHEDULES[schedule])
    assert sorted(first["parts"] + second["parts"]) == sorted(first["names"])
    states = first["state"] + second["state"]
    assert len(set(states)) == len(states)
    assert {entry.partition("/")[0] for entry in second["state"]} <= set(second["parts"])


def test_each_stage_draws_masks_of_its_own_and_repeats_them(two: Ranks) -> None:
    (first, draws), (second, others) = two.run(dropped, LLAMA | {"dropout": 0.2}, {"schedule": "1f1b"})
    assert first == second
    assert first[0] == first[2] != first[1]
    assert draws != others


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "schedule", "degree"),
    [
        *((GPT, each, "shard") for each in ("gpipe", "1f1b", "interleaved")), (GPT, "zero_bubble", "replicate"),
        (LORA, "1f1b", "replicate"), (LORA, "interleaved", "shard"),
    ],
)  # fmt: skip
def test_stages_are_shared_further(four: Ranks, keys: dict[str, Any], degree: str, schedule: str) -> None:
    check(four, keys, False, 1, SCHEDULES[schedule] | {degree: 2})


@pytest.mark.slow
def test_four_stages_train_as_one_process(four: Ranks) -> None:
    for schedule in ("gpipe", "1f1b", "interleaved", "zero_bubble"):
        check(four, GPT, False, 1, {"schedule": schedule})


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "schedule"), [(GPT, "interleaved"), (LLAMA, "1f1b")])
def test_losses_and_norms_of_forty_steps_are_those_of_one_process(
    two: Ranks, keys: dict[str, Any], schedule: str
) -> None:
    check_forty_steps(two, keys, SCHEDULES[schedule])
