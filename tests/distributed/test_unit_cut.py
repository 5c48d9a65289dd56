"""Refusals of tensor parallelism, before anything starts."""

from typing import Any

import pytest
import torch

from llmtrain.distributed.unit_cut import check_unit
from llmtrain.objective.causal import Causal
from llmtrain.precision.fp8_linear import Recipe, convert
from tests.distributed.tensor_cases import FAMILIES, VOCABULARY, make_unit
from tests.helpers.adapted import make, seeded
from tests.helpers.options import make_option


def outline(family: str, **keys: Any) -> Any:
    """A unit without data."""
    config = make_option("model", family, FAMILIES[family] | keys)
    model = config.create(keys.get("vocab_size", VOCABULARY), torch.device("meta"), seeded())
    return Causal(z_loss=0.0, chunk_tokens=None).build(model, (), seeded())


def test_units_without_data_are_accepted() -> None:
    check_unit(outline("tiny"), 4)
    check_unit(outline("llama_tiny", num_kv_heads=2), 2)


@pytest.mark.parametrize(
    ("family", "keys", "ranks", "message"),
    [
        ("tiny", {}, 3, r"distributed.tensor=3: model.num_heads=4 must be divisible by it; distributed.tensor=2"),
        ("llama_tiny", {"num_kv_heads": 2}, 4, r"model.num_kv_heads=2 must be divisible by it; distributed.tensor=2"),
        ("llama_tiny", {"num_kv_heads": 1}, 2, r"model.num_kv_heads=1 must .*; take .*distributed=fsdp"),
        ("llama_tiny", {"intermediate_size": 50}, 4, r"model.intermediate_size=50 must .*; distributed.tensor=2"),
        ("tiny", {"vocab_size": 30}, 4, r"distributed.tensor=4: .*30 tokens"),
        ("tiny", {}, 0, r"distributed.tensor=0: must be at least 1"),
    ],
)
def test_what_ranks_cannot_share_is_refused_with_a_remedy(
    family: str, keys: dict[str, Any], ranks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_unit(outline(family, **keys), ranks)


def test_packed_weights_are_refused() -> None:
    unit = outline("tiny")
    make("lora", targets=["all-linear"], quantization=type(make("lora").quantization)["bf16"]).apply(
        unit.model, seeded()
    )
    with pytest.raises(ValueError, match=r"lora.quantization.*take lora.quantization=none"):
        check_unit(unit, 2)


def test_layers_in_8_bits_are_refused() -> None:
    unit = make_unit()
    assert convert(unit.model.blocks, Recipe.tensorwise)[0]
    with pytest.raises(ValueError, match=r"precision=fp8.*take precision=bf16"):
        check_unit(unit, 2)
