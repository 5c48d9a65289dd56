"""Memory that runs out in a step, and evaluations that fail: neither costs the run."""

from pathlib import Path

import pytest

from tests.faults.victims import STANDARD, assert_all_whole, events
from tests.helpers.cli import assert_same_end, rows
from tests.helpers.launcher import Launcher

PLUGINS = "plugins=[objectives]"
HUNGRY = ("objective._target_=objectives.Hungry", "+objective.passing=0", PLUGINS)
QUICK = ("loop.max_steps=12", "model.dropout=0.0")
SMALL = "accumulation.micro_batch_size="


def numbers(run: Path) -> list[tuple]:
    """What the steps and evaluations came to."""
    keys = ("step", "tokens", "loss", "grad_norm", "batch_size", "val_loss")
    return [tuple(row.get(key) for key in keys) for row in rows(run) if "event" not in row]


def test_the_micro_batch_is_halved_and_the_batch_is_kept(launcher: Launcher, tmp_path: Path) -> None:
    """Bit for bit the run that has the smaller micro-batch from the start; also after a resume, which keeps it."""
    output = launcher.run("train", *STANDARD, *HUNGRY, *QUICK, "+objective.room=1", "run_dir=run")
    told = events(tmp_path / "run", "out_of_memory")
    assert [(row["step"], row["micro_batch_size"]) for row in told] == [(1, 2), (1, 1)]
    assert "room for 1 sequences, not for 4" in told[0]["message"]
    assert "room for 1 sequences, not for 2" in output
    assert {row["batch_size"] for row in rows(tmp_path / "run") if "batch_size" in row} == {4}

    launcher.run("train", *STANDARD, *HUNGRY, *QUICK, "+objective.room=1", f"{SMALL}1", "run_dir=small")
    assert not events(tmp_path / "small", "out_of_memory")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "small")

    for run in ("run", "small"):
        launcher.run("resume", run, PLUGINS, "loop.max_steps=16")
    assert len(events(tmp_path / "run", "out_of_memory")) == 2, "the resumed run had to find it again"
    assert numbers(tmp_path / "run") == numbers(tmp_path / "small")


def test_an_attempt_without_memory_leaves_no_gradient(launcher: Launcher, tmp_path: Path) -> None:
    """Memory runs out in the second micro-batch of a step: the first one is done again, and counts once."""
    hungry = (
        *STANDARD,
        *QUICK,
        "loop.eval_every=0",
        "objective._target_=objectives.Hungry",
        "+objective.room=1",
        PLUGINS,
    )
    launcher.run("train", *hungry, "+objective.passing=1", f"{SMALL}2", "run_dir=run")
    assert [(row["step"], row["micro_batch_size"]) for row in events(tmp_path / "run", "out_of_memory")] == [(1, 1)]
    launcher.run("train", *hungry, "+objective.passing=0", f"{SMALL}1", "run_dir=small")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "small")


def test_resume_keeps_the_halved_micro_batch(launcher: Launcher, tmp_path: Path) -> None:
    """With dropout, whose masks depend on the split: the end is the same, resumed or not."""
    hungry = (*STANDARD, *HUNGRY, "+objective.room=3", "schedule=constant")
    launcher.run("train", *hungry, "loop.max_steps=12", "run_dir=whole")
    launcher.run("train", *hungry, "loop.max_steps=5", "run_dir=run")
    launcher.run("resume", "run", PLUGINS, "loop.max_steps=12")
    for run in (tmp_path / "whole", tmp_path / "run"):
        assert [row["micro_batch_size"] for row in events(run, "out_of_memory")] == [2]
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_ranks_go_on_with_smaller_micro_batches_from_the_last_checkpoint(launcher: Launcher, tmp_path: Path) -> None:
    """Memory runs out in the fourth step; what follows is the run that has the smaller micro-batch."""
    short = (*STANDARD, *QUICK, "loop.max_steps=6", "loop.eval_every=0", "loop.sample_every=0")
    two = ("distributed=ddp", "distributed.processes=2", "checkpoint.every_steps=2", f"{SMALL}2")
    hungry = ("objective._target_=objectives.Hungry", "+objective.room=1", "+objective.passing=3", PLUGINS)
    output = launcher.run("train", *short, *two, *hungry, "run_dir=run")
    assert "memory ran out on rank" in output
    assert "micro-batches of 1 sequence from now on: 2 processes resume" in output
    launcher.run("train", *short, "run_dir=alone")
    ends = [[row["loss"] for row in rows(tmp_path / run) if "grad_norm" in row] for run in ("run", "alone")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    assert len(ends[0]) == 6


def test_a_single_sequence_that_does_not_fit_ends_the_run(launcher: Launcher, tmp_path: Path) -> None:
    output = launcher.run(
        "train", *STANDARD, *HUNGRY, *QUICK, "+objective.room=0", "loop.eval_every=0", "run_dir=run", status=1
    )
    assert "room for 0 sequences, not for 1" in output
    assert "llmtrain: out of memory" in output
    assert "Traceback" not in output
    assert [row["micro_batch_size"] for row in events(tmp_path / "run", "out_of_memory")] == [2, 1]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_an_evaluation_that_fails_loses_nothing(
    launcher: Launcher, undisturbed: Path, tmp_path: Path, asynchronous: str
) -> None:
    """The checkpoint of its step is there, the message says how to go on, and going on is exact."""
    run = tmp_path / "run"
    arguments = ("objective._target_=objectives.Broken", "+objective.message=no such luck", PLUGINS)
    launcher.run("train", *STANDARD, *arguments, "checkpoint.every_steps=0", "loop.max_steps=5", "run_dir=run",
                 f"checkpoint.asynchronous={asynchronous}")  # fmt: skip
    (tmp_path / "broken").touch()
    output = launcher.run("resume", "run", PLUGINS, "loop.max_steps=80", status=1)
    assert "no such luck" in output
    assert "llmtrain resume run" in output
    assert assert_all_whole(run)[-1] == 6
    (tmp_path / "broken").unlink()
    launcher.run("resume", "run", PLUGINS)
    assert assert_all_whole(run)[-1] == 80
