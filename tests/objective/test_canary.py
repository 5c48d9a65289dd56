"""A new objective on a new architecture needs its own files and nothing else: masked words with an encoder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain import Run
from llmtrain.config.assemble import assemble
from llmtrain.objective.causal import Causal
from llmtrain.train.step import Step
from tests.helpers.cli import assert_same_end, cut_back, llmtrain, rows

HERE = Path(__file__).parent
SETTINGS = (
    "plugins=[canary]", "model=encoder", "objective=masked", "tokenizer=byte", "data=python_docs",
    "data.sequence_length=32", "precision=fp32", "optimizer.lr=3e-3", "accumulation.batch_size=16",
    "accumulation.micro_batch_size=16", "loop.sample_every=0", "runtime.num_threads=1",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the plug-in and its configs."""
    shutil.copy(HERE / "canary.py", tmp_path)
    shutil.copytree(HERE / "canary_conf", tmp_path / "conf")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_masked_words_train_resume_and_verify(folder: Path) -> None:
    every = ("loop.max_steps=40", "loop.eval_every=20", "loop.eval_batches=4", "checkpoint.every_steps=20",
             "checkpoint.keep_last=0", "metrics.log_every=1")  # fmt: skip
    llmtrain("train", *SETTINGS, *every, "--config-dir", "conf", "run_dir=run", cwd=folder)
    logged = [row for row in rows(folder / "run") if "loss" in row and "event" not in row]
    assert logged[-1]["masked_loss"] < logged[0]["masked_loss"] - 0.5
    for row in logged:
        assert row["loss"] == pytest.approx(row["masked_loss"] + 0.5 * row["start_loss"], rel=1e-5)
    validations = [row for row in rows(folder / "run") if "val_loss" in row]
    assert {"val_masked_loss", "val_start_loss"} <= validations[-1].keys()
    cut = cut_back(folder / "run", 20, folder / "cut")
    llmtrain("resume", "cut", "plugins=[canary]", cwd=folder)
    assert_same_end(folder / "run", cut)
    assert "bit for bit" in llmtrain("verify", "run", "plugins=[canary]", cwd=folder).stdout


def test_losses_with_counts_of_their_own_do_not_depend_on_the_split(folder: Path) -> None:
    """In float64: two losses, some micro-batches without a target of one of them."""
    run = Run.compose(*SETTINGS, config_dir=folder / "conf")
    parts = assemble(run, torch.device("cpu"))
    parts.unit.double()
    stream = parts.corpus.train
    batch = run.objective.collate(stream.gather(np.arange(12)), np.arange(12), 7)
    assert 0 < batch.counts["start"] < 12
    gradients, losses = [], []
    for size in (12, 1, 2, 5, 7):
        parts.unit.zero_grad()
        loss = Step(parts.unit, parts.optimizer, parts.precision, size).gradients(batch)
        losses.append(loss.total.item())
        gradients.append(torch.cat([p.grad.flatten() for p in parts.unit.parameters()]))
    for gradient, loss in zip(gradients, losses, strict=True):
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-12
        assert loss == pytest.approx(losses[0], rel=1e-12)


def test_masks_differ_by_epoch_and_come_again(folder: Path) -> None:
    run = Run.compose(*SETTINGS, config_dir=folder / "conf")
    stream = assemble(run, torch.device("cpu")).corpus.train
    sequences, first = stream.gather(np.arange(4)), np.arange(4)
    inputs = [
        run.objective.collate(sequences, positions, 1).tensors["inputs"]
        for positions in (first, first, first + len(stream))
    ]
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])


def test_an_objective_of_an_earlier_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Old\.__call__: is of an earlier version and would never be called"):

        class Old(Causal):
            def __call__(self, model: object, inputs: object, targets: object, segments: object = None) -> None: ...
