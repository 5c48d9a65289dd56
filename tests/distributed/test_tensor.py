"""Tensor parallelism: loss, gradients, norm and three steps as in one process."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.tensor_cases import compare
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


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize("unit", UNITS)
def test_steps_are_those_of_one_process(two: Ranks, unit: str, sequence_parallel: bool) -> None:
    for worst in two.run(compare, UNITS[unit], False, sequence_parallel):
        assert max(worst.values()) < TOLERANCE, worst
