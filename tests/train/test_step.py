"""Gradients that stay in their tensors, as CUDA graphs need them: the same numbers, in the same memory."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain import Run
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import Batch, Rows
from llmtrain.train.step import Step
from tests.helpers.cli import TINY, rows
from tests.helpers.memory import MemoryLimit
from tests.helpers.optimizers import OPTIONS
from tests.train.test_rehearsal import make_batch, make_clipping, make_step, peak_of, rehearsal_of, train


def pointers(step: Step) -> list[int]:
    return [weight.grad.data_ptr() for _, weight in step.weights if weight.grad is not None]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_kept_gradients_change_no_bit_and_stay_in_place(name: str) -> None:
    """Over steps, a skipped one, one of fewer sequences without compilation, and a rehearsal."""
    clipping = make_clipping()
    kept, plain = (make_step(OPTIONS[name], keeps_gradients=keeps) for keeps in (True, False))
    places = pointers(kept)
    assert len(places) == len(kept.weights)
    for number, sequences in enumerate((5, 4, 5, 3, 1)):
        batch, skipped, losses = make_batch(sequences, number), float(number == 2), []
        for step in (kept, plain):
            torch.manual_seed(number)  # of dropout
            with step.unit.eager():
                losses.append(train(step, batch, clipping, skipped))
        assert torch.equal(*losses)
        assert pointers(kept) == places
        assert all(not weight.grad.any() for _, weight in kept.weights if weight.grad is not None)
        if number == 0:
            rehearsal_of(kept, clipping)(2, 4)
            assert pointers(kept) == places
    for (_, one), (_, other) in zip(kept.weights, plain.weights, strict=True):
        assert torch.equal(one, other)


def test_kept_gradients_survive_a_halving() -> None:
    clipping, batch = make_clipping(), make_batch(8)
    small = make_step(OPTIONS["adamw"], size=4, keeps_gradients=True)
    room = peak_of(lambda: train(small, batch, clipping))
    halved = make_step(OPTIONS["adamw"], size=8, keeps_gradients=True)
    for _ in range(2):
        torch.manual_seed(0)
        places, sizes = pointers(halved), []
        halved.on_halved = lambda size, message, sizes=sizes: sizes.append(size)
        with MemoryLimit(room + 1000):
            halved.gradients(batch)
        assert pointers(halved) == places
        halved.update(0.0, torch.ones(()))
    assert (halved.micro_batch_size, sizes) == (4, [])  # it stays at the size that fits
    first = [gradient.clone() for gradient in gradients_of(halved, batch)]
    assert all(map(torch.equal, first, gradients_of(make_step(OPTIONS["adamw"], size=4), batch)))


def gradients_of(step: Step, batch: Batch) -> list[Tensor]:
    step.unit.eval()
    step.gradients(batch)
    return [weight.grad for _, weight in step.weights if weight.grad is not None]


def test_every_trained_weight_gets_a_gradient() -> None:
    """A kept gradient of zeros would let the optimizer update a weight that a freed one leaves alone."""
    for overrides in ((), ("model=llama_tiny",)):
        run = Run.compose("tokenizer=byte", "precision=fp32", *(overrides or ("model=tiny",)))
        unit = run.objective.build(
            run.model.create(257, torch.device("cpu"), NamedGenerators(0)), (), NamedGenerators(0)
        )
        ids = np.arange(32).reshape(2, 16)
        batch = run.objective.collate(Rows(ids, ids), np.arange(2), 0)
        sum(unit(batch).values()).backward()  # type: ignore[union-attr]
        assert all(weight.grad is not None for _, weight in unit.trained_weights())


@pytest.mark.gpu
def test_cuda_graphs_with_two_micro_batches_train_as_without(tmp_path: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        same = ("precision=bf16", "accumulation.batch_size=5", "accumulation.micro_batch_size=2", "loop.max_steps=6",
                "model.dropout=0.0", "loop.eval_every=3", "recovery=on", "metrics.log_every=1")  # fmt: skip
        run = Run.compose(*TINY, *same, f"runtime.compile={compiled}", f"runtime.cuda_graphs={compiled}",
                          f"run_dir={tmp_path / compiled}")  # fmt: skip
        found = [row.get("loss", row.get("val_loss")) for row in rows(run.train().run_dir) if "event" not in row]
        losses.append(found)
        assert all(math.isfinite(loss) for loss in found)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
