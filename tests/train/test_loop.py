"""The step: accumulation that is equivalent, refusals that leave no trace."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmtrain import Run
from llmtrain.config.assemble import Parts, assemble
from llmtrain.data import IGNORE, Batch, Rows
from llmtrain.objective.causal import CausalUnit
from llmtrain.run.directory import RunDirectory
from llmtrain.run.session import execute
from llmtrain.train.state import TrainState
from llmtrain.train.step import Step
from tests.helpers.cli import TINY, rows


def assembled(run: Run) -> Parts:
    return assemble(run, torch.device("cpu"))


def gradient_of(parts: Parts) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in parts.unit.parameters() if p.grad is not None])


def test_every_split_of_a_batch_gives_the_same_gradient() -> None:
    """In float64, with random masks: relative difference below 1e-12, and the same loss."""
    run = Run.compose(*TINY, "precision=fp32")
    parts = assembled(run)
    parts.unit.double()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 257, (12, 33), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.6] = IGNORE
    targets[4:7] = IGNORE  # whole micro-batches without a target
    rows_of = Rows(tokens[:, :-1].numpy(), targets.numpy())
    batch = run.objective.collate(rows_of, np.arange(12), 0)
    gradients, losses = [], []
    for micro_batch_size in (12, 1, 2, 3, 5, 7, 100):
        parts.unit.zero_grad()
        step = Step(parts.unit, parts.optimizer, parts.precision, micro_batch_size)
        losses.append(step.gradients(batch).total.item())
        gradients.append(gradient_of(parts))
    logits = parts.unit.model(tokens[:, :-1])[..., :257]
    parts.unit.zero_grad()
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())  # the mean, by torch
    reference.backward()
    exact = gradient_of(parts)
    for gradient, loss in zip(gradients, losses, strict=True):
        assert (gradient - exact).norm() / exact.norm() < 1e-12
        assert loss == pytest.approx(reference.item(), rel=1e-6)
    assert max(losses) - min(losses) < 1e-5


def test_micro_batches_change_no_curve(tmp_path: Path) -> None:
    losses = []
    for micro_batch_size in (6, 4, 1):
        overrides = ("precision=fp32", "accumulation.batch_size=6", f"accumulation.micro_batch_size={micro_batch_size}")
        run = Run.compose(*TINY[:-4], *overrides, "loop.max_steps=8", "loop.eval_every=4", "metrics.log_every=1",
                          "loop.sample_every=0", f"run_dir={tmp_path / str(micro_batch_size)}")  # fmt: skip
        losses.append([row.get("loss", row.get("val_loss")) for row in rows(run.train().run_dir) if "event" not in row])
    for curve in losses[1:]:
        assert curve == pytest.approx(losses[0], rel=1e-4)


class Poisoned(CausalUnit):
    """The first two losses are no numbers."""

    calls: int

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.calls += self.training
        factor = float("nan") if self.calls <= 2 else 1.0
        return {name: total * factor for name, total in super().forward(batch).items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "lion", "adafactor", "adamw_8bit", "adamw_bf16"])
def test_a_step_that_is_not_finite_reaches_no_weight(tmp_path: Path, optimizer: str) -> None:
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=0", "loop.max_steps=4")
    run = Run.compose(*TINY, *every, f"optimizer={optimizer}", "schedule=constant", f"run_dir={tmp_path / 'run'}")
    parts = assembled(run)
    before = {name: tensor.clone() for name, tensor in parts.unit.weights_state().items()}
    parts.unit.__class__ = Poisoned
    parts.unit.calls = 0
    directory = run.create_directory()
    run.describe(directory, parts.device, [])
    result = execute(run, parts, directory, TrainState(), [])
    states = [load_file(path / "model.safetensors") for path in directory.find_checkpoints()]
    for state in states[:2]:
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert any(not torch.equal(states[2][name], before[name]) for name in before)
    assert result.summary["refused_steps"] == 2
    assert [row["step"] for row in rows(result.run_dir) if row.get("event") == "refused"] == [1, 2]
    assert all(tensor.isfinite().all() for tensor in states[-1].values())


def test_the_api_trains_and_returns_the_model(tmp_path: Path) -> None:
    result = Run.compose(*TINY, "loop.max_steps=3", f"output_dir={tmp_path}").train()
    assert result.exit_reason == "finished"
    assert result.summary["step"] == 3
    assert RunDirectory.open(result.run_dir).is_finished()
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "train.log", "loss.png", "summary.json"):
        assert (result.run_dir / name).stat().st_size > 0
    assert sum(p.numel() for p in result.model.parameters()) > 10_000


def test_saves_ahead_of_evaluations_are_left_out_where_they_take_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(folder: Path) -> list[int]:
        run = Run.compose(
            *TINY, f"output_dir={folder}", "loop.max_steps=8", "loop.eval_every=2", "checkpoint.every_steps=0"
        )
        events = rows(run.train().run_dir)
        return [row["step"] for row in events if row.get("event") == "save"]

    assert saved(tmp_path / "short") == [2, 4, 6, 8]
    monkeypatch.setattr("llmtrain.checkpoint.policy.SHORT_SAVE", 0.0)
    monkeypatch.setattr("llmtrain.checkpoint.policy.MAX_SHARE", 0.0)
    assert saved(tmp_path / "long") == [
        2,
        8,
    ]  # what it takes is not known before the first, and there is one at the end
