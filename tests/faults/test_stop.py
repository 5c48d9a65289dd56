"""Signals and the end of the allotted time: the run saves, exits with 75, and goes on as if it had not been stopped."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.victims import (
    STANDARD,
    assert_all_whole,
    assert_log_whole,
    assert_same_rows,
    events,
    hold_in_a_save,
    steps,
    wait_for,
    wait_for_step,
)
from tests.helpers.cli import assert_same_end
from tests.helpers.launcher import Launcher, Victim

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
NEVER = ("checkpoint.every_steps=0", "checkpoint.before_evaluation=false")
SLOW = ("objective._target_=objectives.Slow", "plugins=[objectives]")  # in evaluations


def in_a_step(victim: Victim, run: Path, after: int) -> None:
    wait_for_step(victim, run, after + 5)
    victim.hold()


def in_a_save(victim: Victim, run: Path, after: int) -> None:
    assert hold_in_a_save(victim, run, after=after + 4)


def in_an_evaluation(victim: Victim, run: Path, after: int) -> None:
    wait_for_step(victim, run, after + 1)
    marker = run.parent / "evaluating"
    marker.unlink(missing_ok=True)
    wait_for("an evaluation", marker.exists, victim)
    victim.hold()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "numbers", "arguments"),
    [
        (in_a_step, SIGNALS, NEVER),
        (in_a_save, SIGNALS[::2], ("checkpoint.every_steps=3", "checkpoint.asynchronous=true")),
        (in_a_save, SIGNALS[1::2], ("checkpoint.every_steps=3", "checkpoint.asynchronous=false")),
        (in_an_evaluation, SIGNALS, (*SLOW, "+objective.seconds=0.02")),
    ],
    ids=["step", "save", "synchronous save", "evaluation"],
)
def test_each_signal_at_each_moment_saves_and_resumes_exactly(
    launcher: Launcher,
    undisturbed: Path,
    tmp_path: Path,
    moment: Callable[..., None],
    numbers: tuple[signal.Signals, ...],
    arguments: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    plugins = [argument for argument in arguments if argument.startswith("plugins")]
    victim = launcher.start("train", *STANDARD, *arguments, "run_dir=run")
    newest = 0
    for number in numbers:
        moment(victim, run, newest)
        victim.send(number)
        victim.release()
        output = victim.wait(75)
        assert "llmtrain resume run" in output
        found = assert_all_whole(run)
        assert not list(run.rglob(".tmp-*"))
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["exit_reason"], summary["step"]) == ("interrupted", found[-1])
        assert events(run, "stop")[-1] == {"event": "stop", "step": found[-1], "reason": number.name}
        assert found[-1] > newest
        newest = found[-1]
        victim = launcher.start("resume", "run", *plugins)
    victim.wait(0)
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_log_whole(run)


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ((signal.SIGINT, signal.SIGTERM), 128 + signal.SIGTERM),
        ((signal.SIGUSR1, signal.SIGUSR2), 128 + signal.SIGUSR2),
        ((signal.SIGUSR1, signal.SIGTERM), 75),  # a warning, and what it warned of
        ((signal.SIGHUP, signal.SIGTERM), 75),  # of a terminal that is closed
        ((signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM), 128 + signal.SIGUSR2),
    ],
)
def test_two_signals_during_a_save_leave_a_resumable_run(
    launcher: Launcher, tmp_path: Path, numbers: tuple[int, ...], status: int
) -> None:
    """All are there when the process goes on; it gets them in the order of their numbers."""
    run = tmp_path / "run"
    victim = launcher.start("train", *STANDARD, "checkpoint.every_steps=1", "run_dir=run")
    assert hold_in_a_save(victim, run, after=6)
    before = steps(run)
    for number in numbers:
        victim.send(number)
    victim.release()
    victim.wait(status)
    after = assert_all_whole(run)
    assert after[-1] >= before[-1]
    if status == 75:
        assert events(run, "stop")[-1]["step"] == after[-1]
    launcher.run("resume", "run", "loop.max_steps=20")
    assert assert_all_whole(run)[-1] == 20
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("number", SIGNALS)
def test_the_same_signal_again_ends_at_once(launcher: Launcher, tmp_path: Path, number: int) -> None:
    """While the first is being obeyed: the evaluation comes to the end of its batch, which takes five minutes."""
    run = tmp_path / "run"
    arguments = (*STANDARD, *SLOW, "+objective.seconds=300", "run_dir=run")
    victim = launcher.start("train", *arguments)
    wait_for("the evaluation", (tmp_path / "evaluating").exists, victim)
    victim.send(number)
    time.sleep(0.3)
    assert victim.is_running()
    victim.send(number)
    victim.wait(128 + number, seconds=10)
    assert (run / "config.yaml").exists()


HANDLER = """
import pathlib, signal
def handler(number, frame):
    path = pathlib.Path("handled")
    found = sorted(entry.name for entry in pathlib.Path("run/checkpoints").iterdir())
    with path.open("a") as file:
        file.write(f"{signal.Signals(number).name} after {found}")
signal.signal(signal.NAME, handler)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_handler_of_a_launcher_is_called_after_the_save(launcher: Launcher, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    prelude = HANDLER.replace("NAME", name)
    victim = launcher.start("train", *STANDARD, *NEVER, "run_dir=run", prelude=prelude)
    wait_for_step(victim, run, 3)
    victim.send(getattr(signal, name))
    victim.wait(75)
    (step,) = assert_all_whole(run)
    assert (tmp_path / "handled").read_text() == f"{name} after ['step-{step:08d}']"


def test_the_end_of_max_minutes_saves_and_resumes_exactly(
    launcher: Launcher, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    output = launcher.run("train", *STANDARD, *NEVER, "loop.max_minutes=0.002", "run_dir=run", status=75)
    first = assert_all_whole(run)[-1]
    assert "llmtrain resume run" in output
    assert events(run, "stop") == [{"event": "stop", "step": first, "reason": "loop.max_minutes=0.002"}]
    launcher.run("resume", "run", status=75)
    assert first < assert_all_whole(run)[-1] < 80
    launcher.run("resume", "run", "loop.max_minutes=null")
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_log_whole(run)
