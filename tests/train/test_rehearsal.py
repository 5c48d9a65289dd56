"""The rehearsal of a step: it takes the memory of a real one and changes nothing."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.clipping import Clipping
from llmtrain.data import Batch, Rows
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.objective.causal import Causal
from llmtrain.optimizer import OptimizerConfig
from llmtrain.precision import LossScaler, Precision
from llmtrain.run.autotune import fits_on_device, largest_that_fits
from llmtrain.train.rehearsal import Rehearsal
from llmtrain.train.step import Step
from tests.helpers.memory import MemoryLimit, peak_of
from tests.helpers.optimizers import OPTIONS, option  # noqa: F401
from tests.helpers.options import make_option, option_names

CPU = torch.device("cpu")
OBJECTIVE = Causal(z_loss=0.0, chunk_tokens=None)
LENGTH = 16


def make_clipping(name: str = "norm") -> Clipping:
    return make_option("clipping", name, {"start_step": 0, "max_norm": 0.01})


def make_step(optimizer: Callable[..., OptimizerConfig], *, size: int = 2, keeps_gradients: bool = False) -> Step:
    config = GPTConfig(2, 64, 2, LENGTH, None, 0.1, True, True, None, Initialisation.gpt2)
    generators = NamedGenerators(1)
    unit = OBJECTIVE.build(config.create(101, CPU, generators), (), generators).train()
    precision = Precision("fp32", CPU, scaler=LossScaler(CPU, 16.0, 100))
    return Step(unit, optimizer().build(unit), precision, size, keeps_gradients=keeps_gradients)


def make_batch(sequences: int, seed: int = 0) -> Batch:
    ids = np.random.default_rng(seed).integers(0, 101, (sequences, LENGTH))
    return OBJECTIVE.collate(Rows(ids, np.roll(ids, 1)), np.arange(sequences), 0)


def train(step: Step, batch: Batch, clipping: Clipping, skipped: float = 0.0) -> torch.Tensor:
    """A step of the loop; returns its loss."""
    loss = step.gradients(batch)
    clipping(step.weights, 0)
    step.update(1e-2, torch.tensor(skipped))
    return loss.total


def rehearsal_of(step: Step, clipping: Clipping, *, evaluates: bool = True) -> Rehearsal:
    return Rehearsal(step, OBJECTIVE, clipping, CPU, LENGTH, False, evaluates)


def snapshot(step: Step) -> dict[str, torch.Tensor]:
    scaler = step.precision.scaler
    assert scaler is not None
    own = {"random": torch.get_rng_state(), "scale": scaler.scale, "good_steps": scaler.good_steps}
    tensors = step.unit.state_dict() | state_tensors(step.optimizer) | own
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("clipping", option_names("clipping"))
def test_no_clipping_leaves_a_trace(clipping: str) -> None:
    check_that_nothing_changes(make_step(OPTIONS["adamw"]), make_clipping(clipping))


def test_no_optimizer_changes_weights_or_state(option: Callable[..., OptimizerConfig]) -> None:  # noqa: F811
    check_that_nothing_changes(make_step(option), make_clipping())


def check_that_nothing_changes(step: Step, clipping: Clipping) -> None:
    train(step, make_batch(4), clipping)  # so that there is a state to change
    step.unit.eval()
    before, groups = snapshot(step), [dict(group, params=None) for group in step.optimizer.param_groups]
    rehearsal_of(step, clipping)(2, 5, repeats=2)
    after = snapshot(step)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name
    assert [dict(group, params=None) for group in step.optimizer.param_groups] == groups
    assert all(weight.grad is None for _, weight in step.weights)
    assert not step.unit.training


@pytest.mark.parametrize("name", ["adamw", "lion", "adamw_8bit"])
def test_a_rehearsal_takes_the_memory_of_a_real_step(name: str) -> None:
    clipping, batch = make_clipping(), make_batch(8)
    rehearsal = rehearsal_of(make_step(OPTIONS[name]), clipping, evaluates=False)
    for size in (8, 4, 2):
        step = make_step(OPTIONS[name], size=size)
        real = peak_of(lambda step=step: train(step, batch, clipping))
        assert peak_of(partial(rehearsal, size, 8)) == pytest.approx(real, abs=100)


def test_the_size_that_is_found_is_the_largest_that_a_real_step_has_memory_for() -> None:
    """Without the gradients of a first micro-batch a larger size would be found, and step 1 would run out of memory."""
    clipping, batch = make_clipping(), make_batch(8)
    rehearsal = rehearsal_of(make_step(OPTIONS["adamw"]), clipping, evaluates=False)
    real = {}
    for size in (8, 4, 2):
        step = make_step(OPTIONS["adamw"], size=size)
        real[size] = peak_of(lambda step=step: train(step, batch, clipping))
    limit = (real[4] + real[8]) // 2
    gradients = sum(weight.nbytes for _, weight in rehearsal.step.weights)
    for spare, expected in ((0, 4), (limit - real[2] - 20_000, 2)):
        with MemoryLimit(limit):
            assert largest_that_fits(8, partial(fits_on_device, rehearsal, 8, spare)) == expected
    assert real[4] - gradients < real[2] + 20_000 < real[4]  # what a step without earlier gradients takes


def test_other_errors_of_a_rehearsal_are_raised() -> None:
    class Broken(Clipping):
        start_step = 0

        def __call__(self, parameters: object, step: int) -> None:  # type: ignore[override]
            raise RuntimeError("shapes do not fit")

    step = make_step(OPTIONS["adamw"])
    with pytest.raises(RuntimeError, match="shapes"):
        fits_on_device(rehearsal_of(step, Broken()), 4, 0, 2)
    assert all(weight.grad is None for _, weight in step.weights)
