"""What of a saved state still counts, and children that are whole or not there."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain import Run
from llmtrain.accumulation.auto import AutoBatch
from llmtrain.base.run_files import CONFIG, MODEL, OPTIMIZER
from llmtrain.base.tensor_files import CheckpointError, read_tensors
from llmtrain.checkpoint.format import copy_checkpoint, read_state, verify_checkpoint, write_checkpoint
from llmtrain.config import stored_config
from llmtrain.config.assemble import assemble
from llmtrain.config.older_versions import complete
from llmtrain.data import Batch
from llmtrain.objective.causal import CausalUnit
from llmtrain.run.changes import changes
from llmtrain.run.directory import RunDirectory
from llmtrain.run.environment import describe_environment
from llmtrain.run.resume import Carryover, make_child, plan_resume
from llmtrain.run.session import execute, has_optimizer_of
from llmtrain.run.stored_run import StoredRun
from llmtrain.train.failure import TrainingFailed
from tests.helpers.cli import TINY, assert_same_end, rows

CPU = torch.device("cpu")
FP16 = ("precision=fp16", "precision.initial_scale=65536")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps that has kept every checkpoint.  To be copied, not touched."""
    folder = tmp_path_factory.mktemp("made")
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=0", "loop.max_steps=4", "loop.sample_every=2")
    return Run.compose(*TINY, *FP16, *every, "loop.sample_tokens=5", f"run_dir={folder / 'run'}").train().run_dir


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def stored(run_dir: Path) -> Run:
    return Run.from_config(stored_config.load(run_dir / CONFIG))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def with_state(path: Path, **changes: Any) -> None:
    """Write a checkpoint anew with other entries in its state."""
    model, optimizer = read_tensors(path / MODEL), read_tensors(path / OPTIMIZER)
    state, text = read_state(path) | changes, (path / CONFIG).read_text()
    write_checkpoint(path, model=model, optimizer=optimizer, state=state, config=text)


# --- the state ---------------------------------------------------------------------------------------------------


def test_changed_settings_reset_their_part_of_the_state_alone(run_dir: Path) -> None:
    path, run = checkpoint(run_dir, 4), stored(run_dir)
    kept = {"micro_batch_size": 2, "recovery": {"factor": 0.5}, "scaler": {"scale": 8.0, "good_steps": 1}}
    with_state(path, **kept)
    accumulation, precision = run.accumulation, run.precision
    fp32 = Run.compose(*TINY, "precision=fp32").precision
    others = {
        "none": (run, {}),
        "micro-batch": (
            dataclasses.replace(run, accumulation=dataclasses.replace(accumulation, micro_batch_size=3)),
            {"micro_batch_size": None},
        ),
        "batch": (dataclasses.replace(run, accumulation=dataclasses.replace(accumulation, batch_size=8)), {}),
        "auto": (
            dataclasses.replace(run, accumulation=AutoBatch(accumulation.batch_size)),
            {"micro_batch_size": None},
        ),
        "recovery": (
            dataclasses.replace(run, recovery=Run.compose(*TINY, "recovery=off").recovery),
            {"recovery": {}},
        ),
        "recovery's options": (
            dataclasses.replace(run, recovery=dataclasses.replace(run.recovery, examples=0)),
            {},
        ),
        "scale": (
            dataclasses.replace(run, precision=dataclasses.replace(precision, initial_scale=16.0)),
            {"scaler": {}},
        ),
        "growth": (dataclasses.replace(run, precision=dataclasses.replace(precision, growth_interval=5)), {}),
        "precision": (dataclasses.replace(run, precision=fp32), {}),
    }
    for name, (other, expected) in others.items():
        carryover = Carryover.between(complete(stored_config.load(path / CONFIG)), other)
        state = carryover.restore(path, assemble(other, CPU), other)
        found = {key: getattr(state, key) for key in kept}
        assert found == kept | expected, name
        assert carryover.reset is None


def test_an_optimizer_of_another_kind_keeps_its_own_state(run_dir: Path) -> None:
    run = dataclasses.replace(stored(run_dir), optimizer=Run.compose(*TINY, "optimizer=lion").optimizer)
    parts = assemble(run, CPU)
    carryover = Carryover.between(complete(stored_config.load(run_dir / CONFIG)), run)
    state = carryover.restore(checkpoint(run_dir, 3), parts, run)
    assert (state.step, carryover.reset) == (3, ("AdamW", "Lion"))
    assert all(not value.any() for entry in parts.optimizer.state.values() for value in entry.values())
    weights = read_tensors(checkpoint(run_dir, 3) / MODEL)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in parts.unit.weights_state().items())
    assert not has_optimizer_of(checkpoint(run_dir, 3), run)
    assert has_optimizer_of(checkpoint(run_dir, 3), stored(run_dir))


class Poisoned(CausalUnit):
    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: total * math.nan for name, total in super().forward(batch).items()}


def test_a_rollback_stops_at_another_optimizers_state(run_dir: Path) -> None:
    """Its checkpoints do not fit; the recovery hears that there are none, and goes on from there."""
    ladder = ("recovery.rollback_after=2", "recovery.rollback_steps=1", "recovery.skip_after=0", "recovery.examples=0")
    other = Run.compose(*TINY, *FP16, "optimizer=lion", "loop.max_steps=20", *ladder)
    run = dataclasses.replace(stored(run_dir), optimizer=other.optimizer, recovery=other.recovery, loop=other.loop)
    directory = RunDirectory.open(run_dir)
    with run.runtime.session() as device, directory.lock():
        source = StoredRun(run_dir)
        plan, parts, state = run.restore(source, plan_resume(run, source, branching=False), device, ())
        directory.config.write_text(stored_config.dump(run))
        parts.unit.__class__ = Poisoned
        with pytest.raises(TrainingFailed, match="found no checkpoint old enough once"):
            execute(run, parts, directory, state, [], plan)


def test_changes_are_of_keys_that_are_read() -> None:
    run = Run.compose(*TINY)
    before = stored_config.to_plain(run) | {"run_dir": "elsewhere"}
    assert changes(before, run) == []
    before["optimizer"] = before["optimizer"] | {"lr": 1.0, "option_of_another": 3}
    del before["optimizer"]["eps"]
    assert changes(before, run) == [("optimizer.lr", 1.0, 3e-4), ("optimizer.eps", "not stored", 1e-8)]


# --- children ----------------------------------------------------------------------------------------------------


def branch(run: Run, parent: RunDirectory, step: int, child: RunDirectory) -> None:
    """Make the child and train no step: what a kill right after its creation leaves."""
    with run.runtime.session() as device:
        source = StoredRun(parent.path, step)
        plan, parts, _ = run.restore(source, plan_resume(run, source, branching=True), device, ())
        environment = describe_environment(device, [])
        make_child(child, plan, environment, stored_config.dump(run), source.tokenizer(run), parts.tokenizer)


def test_a_branch_killed_at_its_start_is_resumable(run_dir: Path, tmp_path: Path) -> None:
    run, child = stored(run_dir), RunDirectory.create_at(tmp_path / "child")
    branch(run, RunDirectory.open(run_dir), 2, child)
    names = ["checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl"]
    assert sorted(path.name for path in child.path.iterdir()) == names
    assert max(row["step"] for row in rows(child.path)) == 2
    assert [json.loads(line)["step"] for line in child.samples.read_text().splitlines()] == [2]
    run.resume(RunDirectory.open(child.path))
    assert_same_end(run_dir, child.path)
    assert [entry["step"] for entry in json.loads(child.environment.read_text())["resumes"]] == [2, 2]


def test_a_branch_that_cannot_be_made_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    parent, child = RunDirectory.open(run_dir), RunDirectory.create_at(tmp_path / "child")
    with parent.metrics.open("a") as file:
        file.write("x\n")  # what read_metrics refuses
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line"):
        branch(stored(run_dir), parent, 2, child)
    assert sorted(tmp_path.rglob("*")) == before

    parent.metrics.unlink()
    run = stored(run_dir)
    with run.runtime.session() as device:
        source = StoredRun(parent.path, 2)
        plan, parts, _ = run.restore(source, plan_resume(run, source, branching=True), device, ())
        (checkpoint(run_dir, 2) / MODEL).unlink()  # the parent is at work, and removes what it needs no more
        with pytest.raises(CheckpointError, match=f"{MODEL}: missing"):
            make_child(child, plan, {}, stored_config.dump(run), source.tokenizer(run), parts.tokenizer)
    assert not child.path.exists()


def test_a_half_made_branch_is_no_run(run_dir: Path, tmp_path: Path) -> None:
    child = RunDirectory.create_at(tmp_path / "child")
    copy_checkpoint(checkpoint(run_dir, 2), child.checkpoints / "step-00000002")
    with pytest.raises(ValueError, match="not a run directory"):
        RunDirectory.open(child.path)


def test_a_checkpoint_is_copied_where_it_cannot_be_linked(run_dir: Path, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    source, copy = checkpoint(run_dir, 2), memory / f"llmtrain-test-{tmp_path.name}" / "step-00000002"
    try:
        copy_checkpoint(source, copy)
        verify_checkpoint(copy)
        assert not (copy / MODEL).samefile(source / MODEL)
        assert [path.name for path in copy.parent.iterdir()] == [copy.name]
        (source / MODEL).write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match=MODEL):
            copy_checkpoint(source, copy.with_name("step-00000003"))
        assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    finally:
        for path in sorted(copy.parent.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        copy.parent.rmdir()


# --- failing -----------------------------------------------------------------------------------------------------


def test_a_run_that_gave_up_says_that_resuming_unchanged_ends_the_same(tmp_path: Path) -> None:
    wild = ("optimizer.lr=1e30", "schedule=constant", "precision=fp32", "clipping=none", "recovery=off")
    run = Run.compose(*TINY, *wild, "loop.max_steps=9", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(TrainingFailed, match=r"run would fail again; .* a change: llmtrain resume .* KEY=VALUE"):
        run.train()
