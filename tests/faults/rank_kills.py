"""SIGKILL of one of the ranks of a run, of all, or of their supervisor, which takes them with it.

Ranks are started as torchrun would, by their variables, but forked by a launcher: importing takes seconds.  Those of a
supervisor are real processes.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtrain.distributed.launch import free_port
from tests.faults.campaigns import EVERY_STEP, Bench, judge_checkpoints
from tests.faults.victims import (
    STANDARD,
    assert_all_whole,
    assert_log_whole,
    assert_same_rows,
    files_of,
    newest_row,
    steps,
)
from tests.helpers.launcher import Launcher, Victim
from tests.helpers.processes import is_running

MOMENTS = ("starting", "step", "save")
END_SECONDS = 90.0  # for the ranks that are left, on a busy machine
READY_SECONDS = 900.0  # for a launcher, there
SUPERVISED = 0.15  # share of the kills


@dataclass(frozen=True)
class Shape:
    """The ranks of the runs."""

    processes: int
    option: str  # of the group distributed
    timeout_seconds: float = 60.0

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command line of a run."""
        fixed = (f"distributed={self.option}", f"distributed.processes={self.processes}")
        return (
            *STANDARD,
            EVERY_STEP,
            "precision=fp32",
            "checkpoint.keep_last=2",
            f"distributed.timeout_seconds={self.timeout_seconds:g}",
            *fixed,
        )


class RunningRanks:
    """The ranks of a run, forked, or started by a supervisor."""

    def __init__(
        self,
        launcher: Launcher,
        shape: Shape,
        run: Path,
        *,
        supervised: bool,
        preludes: Mapping[int, str] | None = None,
    ) -> None:
        """Start the run, or resume it; from the beginning where a kill came before it had a config.

        ``preludes``: Python that a forked rank runs before.
        """
        self.run, self.supervised = run, supervised
        has_config = (run / "config.yaml").exists()
        if not has_config:
            shutil.rmtree(run, ignore_errors=True)
        words = ("resume", run.name) if has_config else ("train", *shape.arguments, f"run_dir={run.name}")
        run.parent.mkdir(parents=True, exist_ok=True)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
                 "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # fmt: skip
        if supervised:
            self.victims = [launcher.start(*words, cwd=run.parent)]
            return
        self.victims = [
            launcher.start(*words, cwd=run.parent, environment={
                **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(shape.processes),
                "LOCAL_WORLD_SIZE": str(shape.processes),
            }, prelude=(preludes or {}).get(rank, ""))
            for rank in range(shape.processes)
        ]  # fmt: skip

    @property
    def first(self) -> Victim:
        """Rank 0, or the supervisor."""
        return self.victims[0]

    def is_running(self) -> bool:
        return all(victim.is_running() for victim in self.victims)

    def unfinished_saves(self) -> list[Path]:
        return list((self.run / "checkpoints").glob(".tmp-step-*"))

    def text(self) -> str:
        return "\n".join(f"--- {number}\n{victim.text()}" for number, victim in enumerate(self.victims))

    def kill(self, chosen: list[Victim]) -> None:
        """Kill some, and wait until the others have ended by themselves."""
        children = [pid for victim in self.victims for pid in _children(victim.pid)] if self.supervised else []
        for victim in chosen:
            victim.send(signal.SIGKILL)
        began = time.monotonic()
        while any(victim.is_running() for victim in self.victims) or any(map(is_running, children)):
            assert time.monotonic() - began < END_SECONDS, f"some ranks do not end\n{self.text()}"
            time.sleep(0.02)

    def wait(self) -> None:
        """Wait for the end of a run that nobody disturbs."""
        for victim in self.victims:
            victim.wait(0, seconds=600)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def make_reference(shape: Shape, folder: Path) -> None:
    """The undisturbed run ``whole``."""
    with Launcher(folder) as launcher:
        assert launcher.ready.wait(READY_SECONDS)
        RunningRanks(launcher, shape, folder / "whole", supervised=False).wait()


def reach(ranks: RunningRanks, chance: random.Random, moment: str) -> bool:
    """Wait for a moment in the life of the ranks; False if one of them ended before."""
    done = max(steps(ranks.run), default=0)
    deadline = time.monotonic() + 300
    if moment == "starting":
        time.sleep(chance.uniform(0.0, 6.0))
        return ranks.is_running()
    goal = done + chance.randint(1, 4)

    def is_there() -> bool:
        if moment == "step":
            return newest_row(ranks.run) > goal
        return any(int(path.name.split("-")[2]) > goal for path in ranks.unfinished_saves())

    while ranks.is_running() and not is_there():
        assert time.monotonic() < deadline, f"waited in vain\n{ranks.text()}"
        time.sleep(0.01 if moment == "step" else 0.001)
    time.sleep(chance.uniform(0.0, 0.03 if moment == "step" else 0.15))
    return ranks.is_running()


def rank_kills(bench: Bench, wanted: int, shape: Shape) -> None:
    """SIGKILL of a random rank, of all, or of the supervisor, until ``wanted`` have been tried."""
    number = 0
    assert bench.launcher.ready.wait(READY_SECONDS)
    while bench.record.tried("SIGKILL") < wanted and not bench.is_over():
        number += 1
        run = bench.folder / f"ranks-{number}" / "run"
        _prepare(bench, run.parent)
        ranks, newest = _start(bench, shape, run), 0
        while bench.record.tried("SIGKILL") < wanted and not bench.is_over():
            if not reach(ranks, bench.chance, bench.chance.choices(MOMENTS, (1, 2, 4))[0]):
                break
            who, chosen = _choose(ranks, bench.chance)
            before = newest_row(run)
            ranks.kill(chosen)
            when = "save" if ranks.unfinished_saves() else "step" if before else "starting"
            with bench.record.trial(f"SIGKILL, {who}: {when}"):
                assert any(victim.returncode == -signal.SIGKILL for victim in chosen), ranks.text()
                assert all(victim.returncode for victim in ranks.victims) or max(steps(run), default=0) == 80
                newest = judge_checkpoints(run, newest)
            ranks = _start(bench, shape, run)
        with bench.record.trial("the end of a run killed many times"):
            ranks.wait()
            judge_end(bench.references / "whole", run)
        shutil.rmtree(run.parent)


def _prepare(bench: Bench, folder: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copy(bench.folder / "text.txt", folder)


def _start(bench: Bench, shape: Shape, run: Path) -> RunningRanks:
    return RunningRanks(bench.launcher, shape, run, supervised=bench.chance.random() < SUPERVISED)


def _choose(ranks: RunningRanks, chance: random.Random) -> tuple[str, list[Victim]]:
    if ranks.supervised:
        return "supervisor", ranks.victims
    number = chance.randint(0, len(ranks.victims))
    if number == len(ranks.victims):
        return "all ranks", ranks.victims
    return f"rank {number}", [ranks.victims[number]]


def judge_end(whole: Path, run: Path) -> None:
    """The run has come to the end of the undisturbed one: every byte of the last checkpoint, every row."""
    found = assert_all_whole(run)
    assert found == assert_all_whole(whole)
    assert not list(run.rglob(".tmp-*")), "leftovers"
    one, other = (each / "checkpoints" / f"step-{found[-1]:08d}" for each in (whole, run))
    assert files_of(one) == files_of(other)
    for name in files_of(one):
        if name.endswith(".safetensors") or name == "index.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"
    left, right = (json.loads((path / "state.json").read_text()) for path in (one, other))
    for state in (left, right):
        state.pop("train_seconds")
    assert left == right
    assert_same_rows(whole, run)
    assert_log_whole(run)
    assert os.listdir(run / "ranks")  # noqa: PTH208
