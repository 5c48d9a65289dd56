"""The faults of ``make torture``: each campaign disturbs runs at random until it has had its share, and judges them.

A campaign gets a :class:`Bench`: a launcher, a folder, random numbers of its own, and the record it reports to.
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.format import verify_checkpoint
from tests.faults.clock import YEAR_SECONDS, WallClock
from tests.faults.damage import Damage, absences, flips, names_the_place, truncations
from tests.faults.power import PRELUDE
from tests.faults.victims import (
    STANDARD,
    assert_all_whole,
    assert_log_whole,
    assert_same_rows,
    comes,
    hold_in_a_save,
    newest_row,
    prepare,
    steps,
    unfinished_saves,
    whole_rows,
)
from tests.helpers.cli import assert_same_end
from tests.helpers.launcher import Launcher, Victim

PLUGINS = "plugins=[objectives]"
# Evaluations take long enough to be met; their numbers are those of the run that others are compared with.
SLOW = ("objective._target_=objectives.Slow", "+objective.seconds=0.02", PLUGINS)
EVERY_STEP = "checkpoint.every_steps=1"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
MOMENTS = ("starting", "step", "save", "evaluation")
SWEEP = ("train", "-m", *STANDARD[:-4], "loop.max_steps=30", EVERY_STEP, "optimizer.lr=1e-3,1e-4")


# --- the record -----------------------------------------------------------------------------------------------------


@dataclass
class Count:
    """What became of the faults of one kind."""

    tried: int = 0
    survived: int = 0  # the run went on, or can, and nothing that was saved is lost
    detected: int = 0  # the damage was noticed, and the message names the file
    lost: int = 0


@dataclass
class Record:
    """All that was tried; threads report to it."""

    counts: dict[str, Count] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def tried(self, kind: str) -> int:
        """How many faults whose name begins with ``kind``."""
        with self.lock:
            return sum(count.tried for name, count in self.counts.items() if name.startswith(kind))

    @contextlib.contextmanager
    def trial(self, fault: str, *, detected: bool = False, times: int = 1) -> Iterator[None]:
        """Count a fault by whether the body, which judges what it left, fails."""
        try:
            yield
        except Exception as error:
            with self.lock:
                count = self.counts.setdefault(fault, Count())
                count.tried += times
                count.lost += times
                self.failures.append(f"{fault}: {type(error).__name__}: {error}")
            raise
        with self.lock:
            count = self.counts.setdefault(fault, Count())
            count.tried += times
            if detected:
                count.detected += times
            else:
                count.survived += times


@dataclass
class Bench:
    """What a campaign works with."""

    launcher: Launcher
    folder: Path
    chance: random.Random
    record: Record
    references: Path  # of undisturbed runs
    deadline: float = float("inf")  # of time.monotonic: no new fault after it

    def begin(self, run: Path, *arguments: str, prelude: str = "") -> Victim:
        """Start the run, or resume it; from the beginning where a kill came before it had a config."""
        if (run / "config.yaml").exists():
            resume = ("resume", run.name, *([PLUGINS] if PLUGINS in arguments else []))
            return self.launcher.start(*resume, cwd=run.parent, prelude=prelude)
        shutil.rmtree(run, ignore_errors=True)
        return self.launcher.start("train", *arguments, f"run_dir={run.name}", cwd=run.parent, prelude=prelude)

    def judge_end(self, run: Path, *, rows: bool = True, torn: int = 0) -> None:
        """The run has come to the end of the undisturbed one, bit for bit."""
        assert_all_whole(run)
        assert not list(run.rglob(".tmp-*")), "leftovers"
        assert_same_end(self.references / "whole", run)
        if rows:
            assert_same_rows(self.references / "whole", run)
            assert_log_whole(run, torn=torn)

    def is_over(self) -> bool:
        """Whether there is no time for more."""
        return time.monotonic() > self.deadline


def judge_checkpoints(run: Path, newest: int) -> int:
    """Every checkpoint is whole and that of step ``newest`` has not gone without a newer one; returns the newest."""
    found = max(assert_all_whole(run), default=0)
    assert found >= newest, f"the checkpoint of step {newest} is gone, the newest is {found}"
    return found


# --- moments --------------------------------------------------------------------------------------------------------


def reach(bench: Bench, victim: Victim, run: Path, moment: str) -> bool:
    """Wait for a moment in the life of the victim; False if it ended before."""
    chance, done = bench.chance, max(steps(run), default=0)
    if moment == "starting":
        time.sleep(chance.uniform(0.0, 0.9))
    elif moment == "step":
        comes(lambda: newest_row(run) > done + chance.randint(0, 2), victim)
        time.sleep(chance.uniform(0.0, 0.03))
    elif moment == "save":
        hold_in_a_save(victim, run, after=done, seconds=chance.uniform(0.0, 0.02))
    else:
        marker = run.parent / "evaluating"
        marker.unlink(missing_ok=True)
        comes(marker.exists, victim)
        time.sleep(chance.uniform(0.0, 0.04))
    return victim.is_running()


def observe(victim: Victim, run: Path, moment: str) -> str:
    """The moment that it was, of one that was aimed at; the victim stands still or is dead."""
    if unfinished_saves(victim, run):
        return "save"
    if moment == "evaluation":
        return "evaluation"
    return "step" if "\nstep " in victim.text() else "starting"


# --- campaigns ------------------------------------------------------------------------------------------------------


def kills(bench: Bench, wanted: int) -> None:
    """SIGKILL, until ``wanted`` have been tried by all together."""
    number = 0
    while bench.record.tried("SIGKILL, run") < wanted and not bench.is_over():
        number += 1
        chance = bench.chance
        run = prepare(bench.folder / f"kills-{number}") / "run"
        how = (
            f"checkpoint.asynchronous={chance.choice(('true', 'false'))}",
            f"checkpoint.keep_last={chance.randint(1, 3)}",
        )
        arguments = (*STANDARD, *SLOW, EVERY_STEP, *how)
        victim, newest = bench.begin(run, *arguments), 0
        while bench.record.tried("SIGKILL, run") < wanted:
            moment = chance.choices(MOMENTS, (2, 3, 4, 2))[0]
            if not reach(bench, victim, run, moment):
                break
            victim.kill()
            if victim.returncode != -signal.SIGKILL:
                break
            with bench.record.trial(f"SIGKILL, run: {observe(victim, run, moment)}"):
                newest = judge_checkpoints(run, newest)
            victim = bench.begin(run, *arguments)
        with bench.record.trial("the end of a run killed many times"):
            victim.wait(0)
            bench.judge_end(run)
        shutil.rmtree(run.parent)


def sweep_kills(bench: Bench, wanted: int) -> None:
    """SIGKILL of the job of a sweep, or of the sweep with it; the same command goes on."""
    folder = prepare(bench.folder / "sweep")
    while bench.record.tried("SIGKILL, sweep") < wanted and not bench.is_over():
        victim = bench.launcher.start(*SWEEP, cwd=folder)
        time.sleep(bench.chance.uniform(1.0, 9.0))
        jobs = [path for path in folder.glob("runs/sweeps/*/*/.lock") if _is_locked(path)]
        if not victim.is_running() or not jobs:
            victim.wait()
            shutil.rmtree(folder / "runs", ignore_errors=True)
            continue
        pid = int(jobs[0].read_text() or 0)
        with_it = bench.chance.random() < 0.5
        if with_it:
            victim.kill()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        victim.wait(-signal.SIGKILL if with_it else 1)
        with bench.record.trial(f"SIGKILL, sweep: {'all of it' if with_it else 'its job'}"):
            for job in folder.glob("runs/sweeps/*/*"):
                assert_all_whole(job)
    with bench.record.trial("the end of a sweep killed many times"):
        bench.launcher.run(*SWEEP, cwd=folder)
        for job in folder.glob("runs/sweeps/*/*/config.yaml"):
            whole = bench.references / job.parent.relative_to(folder)
            assert_same_end(whole, job.parent)
            assert_same_rows(whole, job.parent)


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def damages(bench: Bench, wanted: int, passed_over: int) -> None:
    """Bits flipped in every file of a checkpoint, ``wanted`` in all; truncated, missing, more than there should be.

    All go by ``verify_checkpoint``; of the flips ``passed_over``, and all others, also by a resume that has to do
    without the newest checkpoint.
    """
    checkpoint = prepare(bench.folder / "damages") / "step-00000070"
    shutil.copytree(bench.references / "half" / "checkpoints" / checkpoint.name, checkpoint)
    flipped = list(flips(checkpoint, wanted // 5, bench.chance))
    others = [*truncations(checkpoint), *absences()]
    for damage in (*flipped, *others):
        with bench.record.trial(f"damage: {damage.kind}", detected=True), damage.done(checkpoint):
            message = _what_is_wrong(checkpoint)
            assert names_the_place(message, damage, checkpoint), f"{damage}: {message or 'not noticed'}"
    for damage in (*bench.chance.sample(flipped, min(passed_over, len(flipped))), *others):
        if bench.is_over():
            return
        _pass_over(bench, damage)


def _what_is_wrong(checkpoint: Path) -> str:
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def _pass_over(bench: Bench, damage: Damage) -> None:
    run = bench.folder / "damages" / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(bench.references / "half", run)
    damage.do(run / "checkpoints" / "step-00000070")
    with bench.record.trial("a resume past the damage"):
        output = bench.launcher.run("resume", "run", "loop.max_steps=80", cwd=run.parent)
        assert names_the_place(output, damage, Path("run/checkpoints/step-00000070")), f"{damage}\n{output}"
        assert [row["step"] for row in whole_rows(run) if row.get("event") == "resume"] == [60]
        assert_same_end(bench.references / "whole", run)


def full_disks(bench: Bench, wanted: int) -> None:
    """A limit on the length of files, at a random moment and of a random size, for a while or to the end."""
    for number in range(wanted):
        if bench.is_over():
            return
        run = prepare(bench.folder / f"full-{number}") / "run"
        chance = bench.chance
        arguments = (*STANDARD, f"checkpoint.every_steps={chance.randint(1, 5)}",
                     f"checkpoint.asynchronous={chance.choice(('true', 'false'))}")  # fmt: skip
        limit = int(10 ** chance.uniform(2.5, 5.5))
        lasting = chance.random() < 0.4
        with bench.record.trial(f"full disk: {'to the end' if lasting else 'for a while'}"):
            victim = bench.begin(run, *arguments)
            reach(bench, victim, run, chance.choice(("starting", "step", "step")))
            newest = max(assert_all_whole(run), default=0)
            with contextlib.suppress(ProcessLookupError):
                victim.limit_files(limit)
                if not lasting:
                    time.sleep(chance.uniform(0.0, 0.5))
                    victim.limit_files(None)
            victim.wait()
            assert victim.returncode in (0, 1), victim.text()
            assert "Traceback" not in victim.text(), victim.text()
            judge_checkpoints(run, newest)
            if failed := victim.returncode:
                bench.begin(run, *arguments).wait(0)
            bench.judge_end(run, torn=1 if failed else 0)  # it ended with the disk full
        shutil.rmtree(run.parent)


def stops(bench: Bench, wanted: int) -> None:
    """One signal or two, at a random moment."""
    number = 0
    while bench.record.tried("signal") < wanted and not bench.is_over():
        number += 1
        chance = bench.chance
        run = prepare(bench.folder / f"stops-{number}") / "run"
        arguments = (*STANDARD, *SLOW, f"checkpoint.every_steps={chance.choice((1, 1, 3, 0))}",
                     f"checkpoint.asynchronous={chance.choice(('true', 'false'))}")  # fmt: skip
        victim, newest = bench.begin(run, *arguments), 0
        while bench.record.tried("signal") < wanted:
            moment = chance.choices(MOMENTS, (1, 3, 0 if "checkpoint.every_steps=0" in arguments else 3, 2))[0]
            if not reach(bench, victim, run, moment):
                break
            victim.hold()
            if not victim.is_running():
                break
            seen = observe(victim, run, moment)
            numbers = sorted(chance.sample(SIGNALS, chance.choice((1, 1, 1, 2))))
            for one in numbers:
                victim.send(one)
            victim.release()
            with bench.record.trial(f"{'signal' if len(numbers) == 1 else 'signals, two'}: {seen}"):
                victim.wait()
                statuses = {75, 0, 128 + numbers[-1]} if len(numbers) == 2 else {75, 0}
                if seen == "starting":  # before there is a handler
                    statuses |= {130, *(-one for one in numbers), *(128 + one for one in numbers)}
                assert victim.returncode in statuses, f"{numbers}: {victim.returncode}\n{victim.text()}"
                newest = judge_checkpoints(run, newest)
                if victim.returncode == 75:
                    summary = json.loads((run / "summary.json").read_text())
                    assert summary["step"] == newest, "what was reached was not saved"
            victim = bench.begin(run, *arguments)
        with bench.record.trial("the end of a run stopped many times"):
            victim.wait(0)
            bench.judge_end(run)
        shutil.rmtree(run.parent)


def clock_jumps(bench: Bench, wanted: int) -> None:
    """The wall clock goes back and forth by up to thirty years; nothing is due or over by it."""
    if not WallClock.is_possible():
        return
    folder = prepare(bench.folder / "clock")
    clock = WallClock(folder)
    timed = ("checkpoint.every_steps=0", "checkpoint.before_evaluation=false", "checkpoint.every_minutes=30",
             "loop.max_minutes=30")  # fmt: skip
    with Launcher(folder, environment=clock.environment) as launcher:
        while bench.record.tried("wall clock") < wanted and not bench.is_over():
            shutil.rmtree(folder / "run", ignore_errors=True)
            victim = launcher.start("train", *STANDARD, *timed, "run_dir=run")
            jumps = 0
            while victim.is_running():
                time.sleep(bench.chance.uniform(0.0, 0.2))
                clock.jump_to(int(bench.chance.uniform(-30, 30) * YEAR_SECONDS))
                jumps += 1
            with bench.record.trial("wall clock", times=jumps):
                victim.wait(0)
                assert steps(folder / "run") == [80], "a save was due by the wall clock"
                bench.judge_end(folder / "run")


def power_cuts(bench: Bench, wanted: int) -> None:
    """What was not synced is gone, at any of the calls that make or rename."""
    number = 0
    while bench.record.tried("power") < wanted and not bench.is_over():
        number += 1
        chance = bench.chance
        run = prepare(bench.folder / f"power-{number}") / "run"
        arguments = (*STANDARD, "checkpoint.every_steps=1", "checkpoint.before_evaluation=false",
                     f"checkpoint.keep_last={chance.randint(1, 2)}",
                     f"checkpoint.asynchronous={chance.choice(('true', 'false'))}")  # fmt: skip
        newest = 0
        while bench.record.tried("power") < wanted:
            prelude = PRELUDE.format(folder=str(run), at=chance.randint(1, 60), seed=str(chance.random()))
            (run.parent / "told.jsonl").unlink(missing_ok=True)
            victim = bench.begin(run, *arguments, prelude=prelude)
            victim.wait()
            if victim.returncode == 0:
                break
            with bench.record.trial("power cut"):
                assert victim.returncode == -signal.SIGKILL, victim.text()
                told = _told(run.parent / "told.jsonl")
                newest = judge_checkpoints(run, max(newest, told))
        with bench.record.trial("the end of a run that lost power many times"):
            bench.begin(run, *arguments).wait(0)
            bench.judge_end(run, rows=False)
        shutil.rmtree(run.parent)


def _told(path: Path) -> int:
    """The newest step whose checkpoint the run had said was saved."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return max((row["step"] for row in rows if row.get("event") == "save"), default=0)
