"""Runs of replicas through the command line: exact after kills and signals, and read by one process."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from llmtrain.base.places import OUTER_MOMENTUM
from llmtrain.checkpoint.stored_tensors import read_group
from llmtrain.metrics import read_metrics
from tests.distributed.whole_runs import (
    RUN,
    SECONDS,
    TWO,
    llmtrain,
    process_of_rank,
    rows,
    start,
    validations,
    wait_for_step,
    write_text,
)

STEPS, EVERY = 40, 15  # of the run, and from one exchange to the next
LOCAL = (
    *RUN, f"loop.max_steps={STEPS}", "loop.eval_every=20", "loop.sample_every=0", "checkpoint.every_steps=1",
    "distributed=local_sgd", TWO, f"distributed.sync_every={EVERY}",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and the undisturbed run ``whole`` of two replicas."""
    path = tmp_path_factory.mktemp("replicas")
    write_text(path)
    llmtrain(path, "train", "run_dir=whole", *LOCAL)
    return path


def assert_same_end(folder: Path, run: str) -> None:
    """All losses, and every tensor of the last checkpoint, are those of the undisturbed run, bit for bit."""
    one, other = rows(folder / "whole"), rows(folder / run)
    assert sorted(other) == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert [other[step][key] for step in sorted(other)] == [one[step][key] for step in sorted(one)]
    assert validations(folder / run) == validations(folder / "whole")
    checkpoints = [folder / each / "checkpoints" / f"step-{STEPS:08d}" for each in ("whole", run)]
    for group in ("model", "optimizer"):
        expected, found = (read_group(path, group) for path in checkpoints)
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_replicas_exchange_every_so_many_steps_and_at_the_end(folder: Path) -> None:
    found = rows(folder / "whole")
    assert [step for step, row in found.items() if "outer_norm" in row] == [15, 30, 40]
    checkpoint = folder / "whole" / "checkpoints" / f"step-{STEPS:08d}"
    state = read_group(checkpoint, "optimizer")
    own = {entry.partition("/")[0]: tensor for entry, tensor in state.items() if entry.endswith("/own_weight")}
    moments = {entry: tensor for entry, tensor in state.items() if entry.endswith("/replicas/exp_avg")}
    for name, tensor in read_group(checkpoint, "model").items():
        assert torch.equal(own[name][0][: len(tensor)], tensor)  # the last step ended with an exchange
        assert torch.equal(own[name][1], own[name][0])
    assert any(not torch.equal(both[0], both[1]) for both in moments.values())
    assert all(f"{name}/{OUTER_MOMENTUM}" in state for name in own)
    losses = [found[step]["loss"] for step in sorted(found)]
    assert losses[-1] < losses[0] - 0.3


def test_a_killed_rank_ends_in_the_undisturbed_run(folder: Path) -> None:
    process = start(folder, "train", "run_dir=killed", *LOCAL, "distributed.restarts=1")
    wait_for_step(folder / "killed", 12, process)
    os.kill(process_of_rank(folder / "killed", 1), signal.SIGKILL)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output + errors
    assert "restart 1 of 1" in errors
    assert_same_end(folder, "killed")


def test_a_signal_saves_between_two_exchanges_and_a_resume_is_exact(folder: Path) -> None:
    process = start(folder, "train", "run_dir=stopped", *LOCAL, "checkpoint.every_steps=0")
    wait_for_step(folder / "stopped", 4, process)
    os.kill(process_of_rank(folder / "stopped", 1), signal.SIGTERM)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, output + errors
    last = max(rows(folder / "stopped"))
    assert last < STEPS
    state = read_group(folder / "stopped" / "checkpoints" / f"step-{last:08d}", "optimizer")
    own = [tensor for entry, tensor in state.items() if entry.endswith("/own_weight")]
    assert last % EVERY == 0 or any(not torch.equal(both[0], both[1]) for both in own)
    llmtrain(folder, "resume", "stopped")
    assert_same_end(folder, "stopped")


def test_one_process_generates_verifies_and_continues(folder: Path) -> None:
    llmtrain(folder, "generate", "whole", "prompt=Line", "max_tokens=2")
    done = llmtrain(folder, "verify", "whole")
    assert "nothing replayed" in done.stdout
    assert re.search(r"step-0+40 .*intact", done.stdout), done.stdout
    end = ("loop.max_steps=42", "loop.eval_every=0")
    llmtrain(folder, "resume", "whole", *end, "distributed=none")
    assert sorted(rows(folder / "whole"))[-2:] == [41, 42]


@pytest.mark.slow
def test_a_rollback_restores_the_replicas(folder: Path) -> None:
    """A rate that throws the model off: all ranks go back to one checkpoint, and finish the run at a lower rate."""
    quick = (
        "recovery.window_steps=16", "recovery.min_window_steps=8", "recovery.rollback_steps=3",
        "recovery.rollback_skip_batches=2", "recovery.skip_batches=1", "recovery.max_skips=1",
        "recovery.rollback_after=4", "recovery.lower_rate_at=1", "recovery.lower_rate_factor=0.001",
        "checkpoint.keep_last=0", "optimizer.lr=3e-3", "loop.eval_every=0", "loop.max_steps=17",
    )  # fmt: skip
    llmtrain(folder, "train", "run_dir=wild", *LOCAL, *quick)
    llmtrain(folder, "resume", "wild", "optimizer.lr=1.0", "clipping=none", "loop.max_steps=36")
    events = [row for row in read_metrics(folder / "wild" / "metrics.jsonl") if "event" in row]
    (back,) = [row for row in events if row["event"] == "roll_back"]
    assert back["to_step"] < back["step"]
    assert any(row["event"] == "refused" for row in events)
    found = rows(folder / "wild")
    assert sorted(found) == list(range(1, 37))
    assert found[36]["loss"] < found[17]["loss"] + 1
