"""Compilation: when it pays, which part is compiled, and the shapes of rows."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import IGNORE, Rows
from llmtrain.data.batch import padded, widened
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.objective import TrainingUnit
from llmtrain.objective.causal import Causal
from llmtrain.precision import Precision
from llmtrain.train.compilation import CompileSettings, compile_unit, compiles_as_one, compiling_pays
from llmtrain.train.state import TrainState

GPU, CPU = torch.device("cuda"), torch.device("cpu")
SETTINGS = CompileSettings(True, cuda_graphs=False, ideal_seconds=100.0, pads=False, recomputes=False)
OBJECTIVE = Causal(z_loss=0.0, chunk_tokens=None)


def make_unit(num_layers: int = 2) -> TrainingUnit:
    config = GPTConfig(num_layers, 32, 2, 96, None, 0.0, True, True, None, Initialisation.gpt2)
    return OBJECTIVE.build(config.create(50, CPU, NamedGenerators(1)), (), NamedGenerators(0))


def test_compiling_pays_on_a_gpu_from_two_minutes_on() -> None:
    assert compiling_pays(GPU, 49.0)  # 122 s at 40% of the device's rate
    assert not compiling_pays(GPU, 47.0)
    assert compiling_pays(GPU, 241.0, pads=True)  # ten minutes: several lengths are compiled
    assert not compiling_pays(GPU, 239.0, pads=True)
    assert not compiling_pays(CPU, 1e6)


def test_blocks_are_compiled_into_one_graph_where_that_is_possible_and_short() -> None:
    assert compiles_as_one(GPU, 24, SETTINGS)
    assert not compiles_as_one(GPU, 25, SETTINGS)
    assert not compiles_as_one(CPU, 2, SETTINGS)
    assert not compiles_as_one(GPU, 12, replace(SETTINGS, pads=True))
    assert not compiles_as_one(GPU, 12, replace(SETTINGS, recomputes=True))


class Recorded:
    """Stands for a rehearsal on a GPU: records what would be compiled, and fails as the compiler may."""

    device, sequence_length = GPU, 96

    def __init__(self, unit: TrainingUnit, *failures: Exception | None) -> None:
        self.step = SimpleNamespace(unit=unit, precision=Precision("fp32", CPU))
        self.failures = list(failures)
        self.runs: list[tuple[bool, bool, int]] = []  # one graph, block by block, repetitions

    def __call__(self, micro_batch_size: int, batch_size: int, *, repeats: int = 1) -> None:
        model = self.step.unit.model
        self.runs.append((model.compiled_stack is not None, model.compiled_blocks is not None, repeats))
        if self.failures and (failure := self.failures.pop(0)):
            raise failure


def compiled(rehearsal: Any, **changes: Any) -> dict[str, Any]:
    event = compile_unit(rehearsal, replace(SETTINGS, **changes), TrainState(), 2, 4)
    assert event is not None
    return event


def test_blocks_that_are_no_single_graph_are_compiled_one_by_one() -> None:
    broken = RuntimeError("Unsupported: data-dependent branching")
    rehearsal = Recorded(make_unit(), broken)
    assert compiled(rehearsal)["message"].startswith("the model's blocks")
    assert rehearsal.runs == [(True, False, 1), (False, True, 1)]

    rehearsal = Recorded(make_unit())
    assert compiled(rehearsal)["message"].startswith("all 2 blocks in one graph")
    assert rehearsal.runs == [(True, False, 1)]

    rehearsal = Recorded(make_unit(), torch.OutOfMemoryError("CUDA out of memory"))  # the first step will halve
    assert compiled(rehearsal)["event"] == "compiled"
    assert rehearsal.runs == [(True, False, 1)]


def test_a_compiler_that_fails_is_an_error_unless_the_choice_is_automatic() -> None:
    broken = RuntimeError("no ptxas")
    unit = make_unit()
    event = compiled(Recorded(unit, broken, broken), setting="auto")
    assert event["event"] == "not_compiled"
    assert "RuntimeError: no ptxas" in event["message"]
    assert unit.model.compiled_stack is unit.model.compiled_blocks is None
    with pytest.raises(RuntimeError, match="no ptxas"):
        compiled(Recorded(unit, broken, broken))


def test_graphs_are_warmed_up_recorded_and_replayed_before_step_1() -> None:
    unit = make_unit()
    rehearsal = Recorded(unit)
    assert "CUDA graphs" in compiled(rehearsal, cuda_graphs=True)["message"]
    assert rehearsal.runs == [(False, False, 3)]
    whole = unit._compiled_call_impl
    with unit.eager():  # without the compiler's stance, which would leave attention uncompiled as well
        assert unit._compiled_call_impl is None
        assert unit(batch_of([5, 9]))["next_token"].isfinite()
    assert unit._compiled_call_impl is whole is not None


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_all_blocks_are_one_graph_with_the_same_gradients(name: str) -> None:
    from llmtrain import Run

    if name == "gpt":
        unit = make_unit()
    else:
        run = Run.compose("model=llama_tiny", "tokenizer=byte")
        unit = OBJECTIVE.build(run.model.create(50, CPU, NamedGenerators(1)), (), NamedGenerators(0))
    batch = batch_of([20, 20], width=20)
    expected = gradients(unit, batch)
    model: LanguageModel = unit.model
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compiled_stack = torch.compile(model._run_uncompiled, backend=backend, dynamic=False, fullgraph=True)
    assert all(map(torch.equal, gradients(unit, batch), expected))
    assert len(graphs) == 1
    with unit.eager():
        gradients(unit, batch)
    assert len(graphs) == 1


def gradients(unit: TrainingUnit, batch: Any) -> list[torch.Tensor]:
    unit.zero_grad()
    unit(batch)["next_token"].backward()
    return [weight.grad.clone() for _, weight in unit.trained_weights() if weight.grad is not None]


# --- the shapes of rows -----------------------------------------------------------------------------------------------


def batch_of(lengths: list[int], width: int = 96) -> Any:
    ids = np.random.default_rng(0).integers(0, 50, (len(lengths), width))
    targets = np.roll(ids, -1, 1)
    for row, length in enumerate(lengths):
        ids[row, length:], targets[row, length:] = 0, IGNORE
    return OBJECTIVE.collate(Rows(ids, targets, None, np.array(lengths)), np.arange(len(lengths)), 0)


def test_compiled_rows_have_few_lengths() -> None:
    lengths = range(1, 1025)
    assert sorted({widened(length, 1024) for length in lengths}) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(length <= widened(length, 5000) for length in range(1, 5001))
    assert (widened(650, 700), widened(700, 700), widened(10, 16)) == (700, 700, 16)
    longer = sum(widened(length, 1024) for length in lengths) / sum(padded(length, 1024) for length in lengths)
    assert longer == pytest.approx(1.1, abs=0.01)


def test_longer_rows_change_no_loss() -> None:
    unit = make_unit().double()
    (batch,) = batch_of([65, 33, 7]).split(3)
    assert batch.tensors["inputs"].shape == (3, 96)
    (short,) = batch_of([33, 7]).split(2)
    assert short.tensors["inputs"].shape == (2, 40)
    assert unit.fit_shape(short) is short  # not compiled
    unit.compile_blocks(longest=96)
    wide = unit.fit_shape(short)
    assert {name: tuple(tensor.shape) for name, tensor in wide.tensors.items()} == {
        "inputs": (2, 64), "targets": (2, 64)
    }  # fmt: skip
    assert (wide.counts, wide.tokens, wide.lengths) == (short.counts, short.tokens, short.lengths)
    with unit.eager():
        assert unit.fit_shape(short) is short
        torch.testing.assert_close(unit(wide), unit(short), rtol=1e-12, atol=0.0)
