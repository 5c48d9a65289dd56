"""Pipelines: losses, gradients, norms and weights as in one process, by every schedule."""

from typing import Any

import pytest

from tests.distributed.pipeline_cases import compare
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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("keys", [GPT, LLAMA, LORA], ids=["gpt tied", "llama grouped queries", "lora"])
def test_steps_are_those_of_one_process(two: Ranks, keys: dict[str, Any], schedule: str) -> None:
    check(two, keys, False, 2, SCHEDULES[schedule])
