"""SIGKILL at any moment: what is named a checkpoint is whole, and the end is that of the undisturbed run."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.victims import (
    STANDARD,
    assert_all_whole,
    assert_log_whole,
    assert_same_rows,
    hold_in_a_save,
    steps,
    unfinished_saves,
    wait_for_step,
)
from tests.helpers.cli import assert_same_end
from tests.helpers.launcher import Launcher

EVERY_STEP = (*STANDARD, "checkpoint.every_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_killed_many_times_ends_as_an_undisturbed_one(
    launcher: Launcher, undisturbed: Path, tmp_path: Path, asynchronous: str
) -> None:
    """Nine of them: in turn in the middle of a save, a moment after a step, and while the run is starting."""
    chance = random.Random(f"kills {asynchronous}")
    run = tmp_path / "run"
    victim = launcher.start("train", *EVERY_STEP, f"checkpoint.asynchronous={asynchronous}", "run_dir=run")
    newest, in_saves = 0, 0
    for number in range(9):
        if number % 3 == 2 and run.exists():
            time.sleep(chance.uniform(0, 0.8))
        elif number % 3 == 1:
            wait_for_step(victim, run, newest + 3)
            time.sleep(chance.uniform(0, 0.03))
        else:
            assert hold_in_a_save(victim, run, after=newest + 2, seconds=chance.uniform(0, 0.004))
        victim.kill()
        assert victim.returncode == -signal.SIGKILL, victim.text()
        in_saves += bool(unfinished_saves(victim, run))
        found = assert_all_whole(run)
        assert max(found, default=0) >= newest, "a checkpoint that was there is lost"
        newest = max(found, default=0)
        victim = launcher.start("resume", "run")
    victim.wait(0)
    assert in_saves >= 3
    assert steps(run) == [79, 80]
    assert not list(run.rglob(".tmp-*"))
    assert_all_whole(run)
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_log_whole(run)
