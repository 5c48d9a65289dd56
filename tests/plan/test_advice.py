"""What is suggested fits, and is in order."""

import dataclasses

import pytest
import torch

from llmtrain import Run
from llmtrain.plan.advice import suggest
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.memory import estimate

OVERRIDES = ("model=tiny", "tokenizer=byte", "model.num_layers=6", "data.sequence_length=64", "precision=fp32",
             "accumulation.batch_size=16", "accumulation.micro_batch_size=16")  # fmt: skip


def blueprint(*overrides: str) -> Blueprint:
    run = Run.compose(*OVERRIDES, *overrides)
    return Blueprint(run, 257, run.precision.build(torch.device("cpu")), 16)


@pytest.mark.slow
def test_each_suggestion_makes_it_fit_as_a_run_of_its_own() -> None:
    present = blueprint()
    memory = estimate(present, gpu=True)
    room = memory.needed - memory.parts["activations"] // 2
    suggestions = suggest(present, memory, gpu=True, available=room, copied=False, bf16=False)
    assert len(suggestions) == 3
    assert [s.slower for s in suggestions] == sorted(s.slower for s in suggestions)
    assert suggestions[0].overrides == ("accumulation.micro_batch_size=8",)
    for suggestion in suggestions:
        again = estimate(blueprint(*suggestion.overrides), gpu=True)
        assert again.needed <= room
        assert again.needed == suggestion.memory.needed


def test_where_nothing_fits_nothing_is_suggested() -> None:
    present = blueprint()
    memory = estimate(present, gpu=True)
    assert suggest(present, memory, gpu=True, available=1000, copied=False, bf16=False) == []


def test_bf16_is_suggested_where_the_device_has_it() -> None:
    present = blueprint()
    memory = estimate(present, gpu=True)
    room = memory.needed - memory.parts["activations"] // 8
    suggestions = suggest(present, memory, gpu=True, available=room, copied=False, bf16=True)
    assert suggestions[0].overrides == ("precision=bf16",)
    assert dataclasses.is_dataclass(suggestions[0].memory)
