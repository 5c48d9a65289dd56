"""Time is measured by a clock that does not jump; nothing depends on what the wall clock says."""

import contextlib
import datetime
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain import Run
from llmtrain.config.assemble import assemble
from llmtrain.display import open_display
from llmtrain.run.session import make_log, make_loop, make_saver, make_step
from llmtrain.train.profiler import Profiler
from llmtrain.train.state import TrainState
from tests.faults.clock import YEAR_SECONDS, WallClock
from tests.faults.victims import STANDARD, assert_log_whole, assert_same_rows, events, prepare, steps, wait_for_step
from tests.helpers.cli import assert_same_end
from tests.helpers.launcher import Launcher

NEVER = ("checkpoint.every_steps=0", "checkpoint.before_evaluation=false")


@pytest.mark.slow
@pytest.mark.skipif(not WallClock.is_possible(), reason="needs a C compiler")
def test_a_jump_of_the_wall_clock_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """By years, there and back: no save is due for it, no time is over, and the end is the same."""
    clock = WallClock(tmp_path)
    run = tmp_path / "run"
    timed = ("checkpoint.every_minutes=30", "loop.max_minutes=30")
    with Launcher(prepare(tmp_path), environment=clock.environment) as launcher:
        victim = launcher.start("train", *STANDARD, *NEVER, *timed, "run_dir=run")
        for step, years in ((10, 1), (25, -30), (40, 8), (55, 0)):
            wait_for_step(victim, run, step)
            clock.jump_to(years * YEAR_SECONDS)
        victim.wait(0)
    this_year = datetime.date.today().year
    seen = {int(line[:4]) for line in (run / "train.log").read_text().splitlines()}
    assert {this_year, this_year + 1, this_year + 8} < seen
    assert min(seen) <= this_year - 29
    assert steps(run) == [80]
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_log_whole(run)


def run_by_clock(folder: Path, clock: Callable[[int], float], *overrides: str) -> tuple[str, list[int]]:
    """Train to the end, by a clock that shows ``clock(step)`` seconds; returns how it ended, and the steps saved."""
    overrides = tuple(override.replace("data.path=", f"data.path={folder}/") for override in (*STANDARD, *overrides))
    run = Run.compose(*overrides, *NEVER, "checkpoint.keep_last=0", "loop.eval_every=0", f"run_dir={folder / 'run'}")
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(run.runtime.session())
        run.runtime.seed_everything()
        parts = assemble(run, device)
        directory = run.create_directory()
        run.describe(directory, device, [])
        state = TrainState(data=parts.corpus.fingerprint)
        metrics = stack.enter_context(run.metrics.build(directory.path, resume_step=None))
        display = stack.enter_context(open_display(directory.path))
        log = make_log(run, parts, directory, metrics, display, peak_flops=1e12, log_every=run.metrics.log_every,
                       profiler=Profiler())  # fmt: skip
        log.clock = lambda: clock(state.step)
        log.restart()
        saver = stack.enter_context(make_saver(run, directory, parts))
        step = make_step(run, parts, state, log)
        timed = make_loop(run, parts, directory, state, step, log, saver, stop=lambda: None)
        stack.enter_context(contextlib.closing(timed))
        reason = timed.run()
    assert [row["step"] for row in events(directory.path, "save")] == steps(directory.path)
    return reason, steps(directory.path)


def test_saves_by_time_are_counted_from_the_last_save(tmp_path: Path) -> None:
    """A step takes 10 s: every 60 s is every six steps, counted from the last save."""
    reason, saved = run_by_clock(
        prepare(tmp_path), lambda step: 10.0 * step, "checkpoint.every_minutes=1", "loop.max_steps=20"
    )
    assert (reason, saved) == ("finished", [6, 12, 18, 20])


def test_a_computer_that_slept_saves_once(tmp_path: Path) -> None:
    """A week between two steps is one save, and the next is due as long after it as ever."""
    reason, saved = run_by_clock(
        prepare(tmp_path),
        lambda step: 10.0 * step + 604_800 * (step >= 9),
        "checkpoint.every_minutes=1",
        "loop.max_steps=20",
    )
    assert (reason, saved) == ("finished", [6, 9, 15, 20])


def test_max_minutes_counts_from_the_start_of_the_process(tmp_path: Path) -> None:
    reason, saved = run_by_clock(
        prepare(tmp_path), lambda step: 1e6 + 10.0 * step, "loop.max_minutes=2", "loop.max_steps=20"
    )
    assert (reason, saved) == ("interrupted", [12])
