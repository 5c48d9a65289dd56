"""Heartbeats: ranks that hang are named and the job ends; ranks that make progress are left alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtrain.distributed.heartbeat import Clock, Heartbeat, beat_seconds
from llmtrain.distributed.launch import free_port
from llmtrain.distributed.phases import Phase, Position, judge, last_key

HELPERS = Path(__file__).parents[1] / "helpers"
PROGRAM = HELPERS / "beating_program.py"
ROOT = Path(__file__).parents[2]
TIMEOUT = 3.0


def at(rank: int, phase: Phase, step: int, seconds: float, silence: float = 0.0) -> Position:
    return Position(rank, "ab"[rank % 2], phase, step, seconds, silence)


def test_the_rank_behind_is_named_with_the_others() -> None:
    ranks = [at(rank, Phase.reduce, 1517, 89.0) for rank in range(8) if rank != 3] + [at(3, Phase.data, 1516, 90.2)]
    found = judge(ranks, 60.0)
    assert found is not None
    assert found.text == ("rank 3 on host b has been in the data loader at step 1,516 for 90 s; "
                          "7 ranks wait in all_reduce at step 1,517")  # fmt: skip
    assert judge(ranks, 91.0) is None


def test_within_a_step_ranks_that_wait_are_ahead() -> None:
    found = judge([at(0, Phase.save, 5, 70.0), at(1, Phase.reduce, 5, 69.0)], 60.0)
    assert found is not None
    assert found.ranks == (0,)
    assert found.text.startswith("rank 0 on host a has been saving a checkpoint at step 5 for 70 s; 1 rank waits in")


def test_a_rank_whose_heartbeat_is_late_is_not_behind() -> None:
    """All were in one phase for long; one has left it, and the other's next heartbeat has not come yet."""
    ranks = [at(0, Phase.compute, 1, 0.2), at(1, Phase.compile, 0, 70.0)]
    assert judge(ranks, 60.0, behind_seconds=1.0) is None
    assert judge(ranks, 60.0, behind_seconds=61.0) is not None
    assert last_key(ranks) == ranks[1].key
    assert last_key(ranks[1:]) is None


def test_a_rank_behind_that_makes_progress_is_left_alone() -> None:
    assert judge([at(0, Phase.evaluate, 5, 2.0), at(1, Phase.reduce, 5, 900.0)], 60.0) is None


def test_a_silent_rank_is_named_before_one_behind() -> None:
    found = judge([at(0, Phase.data, 5, 70.0), at(1, Phase.save, 6, 3.0, silence=65.0)], 60.0)
    assert found is not None
    assert found.text == ("no heartbeat from rank 1 on host b for 65 s, last saving a checkpoint at step 6; "
                          "1 rank is in the data loader at step 5")  # fmt: skip


def test_ranks_that_are_all_in_one_place_are_reported() -> None:
    found = judge([at(rank, Phase.reduce, 5, 60.0 + rank) for rank in range(4)], 59.0)
    assert found is not None
    assert found.text.startswith("all 4 ranks have been in all_reduce at step 5 for 60 s, and none is behind")
    assert judge([at(rank, Phase.reduce, 5, 60.0 * rank) for rank in range(4)], 59.0) is None  # one came just now


def test_a_rank_whose_thread_writes_is_told_from_those_that_wait_for_its_save() -> None:
    ranks = [at(0, Phase.save, 6, 70.0), replace(at(1, Phase.save, 6, 70.0), writing=75.0)]
    found = judge(ranks, 60.0)
    assert found is not None
    assert found.ranks == (1,)
    assert found.text == ("rank 1 on host b has been writing a checkpoint for 75 s; "
                          "1 rank is saving a checkpoint at step 6")  # fmt: skip


def test_a_rank_that_has_begun_fewer_collective_operations_is_named() -> None:
    ranks = [replace(at(rank, Phase.compute, 6, 70.0), collectives=90 - (rank == 2)) for rank in range(4)]
    found = judge(ranks, 60.0)
    assert found is not None
    assert found.text == ("rank 2 on host a has not begun an operation that the others wait in, in forward and "
                          "backward for 70 s; 3 ranks are in forward and backward at step 6")  # fmt: skip


def test_ranks_that_have_left_are_not_missed() -> None:
    assert judge([at(0, Phase.left, 9, 0.0, silence=999.0), at(1, Phase.end, 9, 1.0)], 60.0) is None


def test_many_ranks_are_judged_in_little_time() -> None:
    ranks = [at(rank, Phase.reduce, 1517, 89.0) for rank in range(1, 1000)] + [at(0, Phase.data, 1516, 90.0)]
    assert min(timeit.repeat(lambda: judge(ranks, 60.0), number=1, repeat=5)) < 0.05
    assert beat_seconds(8, 600.0) == 1.0
    assert beat_seconds(1000, 600.0) == 2.0
    assert beat_seconds(8, 4.0) == 0.5


def test_marking_takes_a_microsecond_at_most() -> None:
    heartbeat = Heartbeat("127.0.0.1", 1, 0, 2)
    repeats = timeit.repeat(lambda: heartbeat.mark(Phase.data, 7), timer=time.process_time, number=20_000, repeat=5)
    seconds = min(repeats) / 20_000
    print(f"mark: {1e9 * seconds:.0f} ns")
    assert seconds < 2e-6  # 0.35 µs where a call of an empty function takes 0.1 µs


def test_time_while_a_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    clock = Clock(1.0)
    moment += 1.5
    assert clock.now() == 1.5
    moment += 3600.0
    assert clock.now() == 4.5


# --- real processes ---------------------------------------------------------------------------------------------------


class Nursery:
    """A process that has imported torch and forks ranks."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.process = subprocess.Popen([sys.executable, str(PROGRAM)], env=environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)  # fmt: skip

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline().replace("None", "null"))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.process.kill()
    nursery.process.wait()


class Ranks:
    """Two ranks with heartbeats, without a supervisor."""

    def __init__(self, nursery: Nursery, folder: Path, behaviour: str, odd: int, timeout: float = TIMEOUT) -> None:
        self.nursery, self.run, port = nursery, folder, str(free_port())
        self.status: dict[int, int | None] = {}
        arguments = [behaviour, str(odd), str(folder), str(timeout)]
        self.pids = [
            nursery.ask(arguments=arguments, errors=str(folder / f"errors-{rank}"),
                        environment={"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port})
            for rank in (0, 1)
        ]  # fmt: skip

    def end(self, *ranks: int) -> float:
        """Wait for the end of ``ranks``; returns the seconds since the odd one began to misbehave."""
        deadline = time.monotonic() + 40
        for rank in ranks:
            while (status := self.nursery.ask(poll=self.pids[rank])) is None:
                assert time.monotonic() < deadline, f"rank {rank} has not ended"
                time.sleep(0.05)
            self.status[rank] = status
        odd = self.run / "odd"
        return time.time() - float(odd.read_text()) if odd.exists() else 0.0

    def errors(self, rank: int = 0) -> str:
        return (self.run / f"errors-{rank}").read_text()

    def close(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.status:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def ranks(nursery: Nursery, tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start(*arguments: Any) -> Ranks:
        started.append(Ranks(nursery, tmp_path, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.close()
        for file in sorted(tmp_path.rglob("errors-*")) + sorted(tmp_path.rglob("rank-*.log")):
            print(f"--- {file.name}\n{file.read_text()}")


def test_a_rank_that_sleeps_is_named_and_all_write_their_stacks(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    job = ranks("sleep", 1)
    seconds = job.end(0, 1)
    print(f"named and ended after {seconds:.1f} s with a time-out of {TIMEOUT:g} s")
    assert list(job.status.values()) == [1, 1]
    assert TIMEOUT < seconds < TIMEOUT + 5
    errors, log = job.errors(), (tmp_path / "train.log").read_text()
    for text in (errors, log):
        assert text.count("rank 1 on host") == 2  # the warning and the verdict
        assert "has been in the data loader at step 3 for" in text
        assert "1 rank waits in all_reduce at step 3" in text
        assert text.count("warning: ") == 1
    assert "misbehave" in (tmp_path / "ranks" / "stacks-00001.txt").read_text()
    assert "has been in the data loader" in (tmp_path / "ranks" / "stacks-00000.txt").read_text()
    assert not (tmp_path / "ranks" / "rank-00000.log").exists()


def test_a_stopped_rank_is_named(ranks: Callable[..., Ranks]) -> None:
    job = ranks("stopped", 1)
    seconds = job.end(0)
    assert job.status[0] == 1
    assert seconds < TIMEOUT + 6
    assert "no heartbeat from rank 1 on host" in job.errors()
    assert "last in the data loader at step 3" in job.errors()


def test_a_stopped_rank_with_the_store_is_named(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    job = ranks("stopped", 0)
    job.end(1)
    assert job.status[1] == 1
    log = (tmp_path / "ranks" / "rank-00001.log").read_text()
    assert f"no answer from rank 0 (host {socket.gethostname()}) and its store" in log
    assert "no answer from rank 0" in (tmp_path / "train.log").read_text()


def test_a_rank_that_holds_the_interpreter_is_named(ranks: Callable[..., Ranks]) -> None:
    job = ranks("gil", 1)
    job.end(0)
    assert job.status[0] == 1
    assert "no heartbeat from rank 1 on host" in job.errors()


def test_ranks_end_when_the_store_is_gone(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    job = ranks("killed", 0, 60.0)
    assert job.end(1) < 10
    assert job.status[1] == 1
    assert f"rank 0 (host {socket.gethostname()}) is gone" in (tmp_path / "ranks" / "rank-00001.log").read_text()


def test_the_error_of_a_rank_ends_the_others(ranks: Callable[..., Ranks]) -> None:
    job = ranks("error", 1, 60.0)
    assert job.end(0, 1) < 8
    assert list(job.status.values()) == [1, 1]
    assert "failed: rank 1 on host" in job.errors()
    assert "'weights'" in job.errors()


def test_a_slow_rank_that_makes_progress_is_waited_for(ranks: Callable[..., Ranks]) -> None:
    job = ranks("progress", 1, 2.0)
    assert job.end(0, 1) > 2.0
    assert list(job.status.values()) == [0, 0]
    assert "warning" not in job.errors()


def test_a_job_that_was_suspended_as_a_whole_continues(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    job = ranks("progress", 1, 2.0)
    while not (tmp_path / "odd").exists():
        time.sleep(0.05)
    for number, seconds in ((signal.SIGSTOP, 4.0), (signal.SIGCONT, 0.0)):
        for pid in job.pids:
            os.kill(pid, number)
        time.sleep(seconds)
    job.end(0, 1)
    assert list(job.status.values()) == [0, 0]


def test_ranks_that_are_well_leave_with_their_status(ranks: Callable[..., Ranks]) -> None:
    job = ranks("leave", 1, 60.0)
    job.end(0, 1)
    assert list(job.status.values()) == [75, 75]
    assert not job.errors()


def test_an_error_in_a_collective_ends_each_rank_with_status_1(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    job = ranks("collective", 1, 60.0)
    job.end(0, 1)
    assert list(job.status.values()) == [1, 1]
    log = (tmp_path / "ranks" / "rank-00001.log").read_text()
    assert "KeyError: 'weights'" in log
    assert log.endswith("unwritten")


def test_a_supervisor_ends_a_stopped_rank_and_reports_the_verdict(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [str(PROGRAM), "stopped", "1", str(tmp_path), str(TIMEOUT)]
    command = [sys.executable, str(HELPERS / "supervise.py"), "2", "0", *program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    errors = ended.stderr
    assert ended.returncode == 1, errors
    assert errors.count("no heartbeat from rank 1 on host") == 2, errors  # the warning and the verdict of rank 0
    assert "was ended by" not in errors
    assert "--- rank 1 of 2 on " in (tmp_path / "ranks" / "rank-00001.log").read_text()
    assert not (tmp_path / "ranks" / "rank-00000.log").exists()
