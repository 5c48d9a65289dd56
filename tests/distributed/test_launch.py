"""The supervisor: ranks are started, get signals once, and end together, with the cause of a failure."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import is_running

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]


class Job:
    """A supervisor with its ranks."""

    def __init__(self, folder: Path, behaviour: str, processes: int, odd: int, restarts: int, **variables: str) -> None:
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)} | variables
        program = [str(HELPERS / "rank_program.py"), behaviour, str(odd), str(folder)]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(HELPERS / "supervise.py"), str(processes), str(restarts), *program], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for(self, name: str, *ranks: int) -> None:
        """Wait for files that ranks leave."""
        deadline = time.monotonic() + 60
        while not all((self.folder / f"{name}-{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline, f"no {name}: {self.process.communicate(timeout=5)}"
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; returns the exit status, the output and the errors."""
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors

    def pids(self, *ranks: int) -> list[int]:
        self.wait_for("pid", *ranks)
        return [int((self.folder / f"pid-{rank}").read_text()) for rank in ranks]


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    jobs: list[Job] = []

    def make(behaviour: str, processes: int = 2, odd: int = 1, restarts: int = 0, **variables: str) -> Job:
        jobs.append(Job(tmp_path, behaviour, processes, odd, restarts, **variables))
        return jobs[-1]

    yield make
    for job in jobs:
        job.process.kill()
        job.process.wait()


def test_ranks_get_their_places_and_share_the_cores(start: Start, tmp_path: Path) -> None:
    status, output, errors = start("well", OMP_NUM_THREADS="").end()
    assert (status, errors) == (0, "")
    assert output.splitlines() == ["rank 0 begins", "without torch"]  # rank 1's output is not on the terminal
    places = [dict(entry.split("=") for entry in (tmp_path / f"started-{rank}").read_text().split()) for rank in (0, 1)]
    for rank, place in enumerate(places):
        assert place["RANK"] == place["LOCAL_RANK"] == str(rank)
        assert place["WORLD_SIZE"] == place["LOCAL_WORLD_SIZE"] == "2"
        assert place["MASTER_ADDR"] == "127.0.0.1"
        assert 1 <= int(place["OMP_NUM_THREADS"]) <= max((os.cpu_count() or 1) // 2, 1)


def test_the_number_of_threads_that_the_user_has_set_stays(start: Start, tmp_path: Path) -> None:
    assert start("well", OMP_NUM_THREADS="7").end()[0] == 0
    assert "OMP_NUM_THREADS=7" in (tmp_path / "started-1").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_reaches_every_rank_once_and_75_is_kept(start: Start, tmp_path: Path, number: int) -> None:
    job = start("stop")
    job.wait_for("ready", 0, 1)
    job.process.send_signal(number)
    status, _, errors = job.end()
    assert (status, errors) == (75, "")
    assert [(tmp_path / f"received-{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


def test_a_stop_before_ranks_can_save_is_no_failure(start: Start) -> None:
    job = start("sleep", restarts=1)
    job.wait_for("ready", 0, 1)
    job.process.send_signal(signal.SIGTERM)
    status, _, errors = job.end()
    assert (status, errors) == (128 + signal.SIGTERM, "")


def test_75_of_all_ranks_that_ended_normally_is_the_status(start: Start) -> None:
    status, _, errors = start("status", STATUS="75").end()
    assert (status, errors) == (75, "")


def test_a_killed_rank_is_named_and_the_others_end(start: Start) -> None:
    job = start("killed", processes=3, odd=2)
    job.wait_for("gone", 2)
    began = time.monotonic()
    status, _, errors = job.end()
    print(f"ended {time.monotonic() - began - 0.3:.2f} s after the SIGKILL")
    assert status == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("llmtrain: ")]
    assert line.startswith("llmtrain: rank 2 on ")
    assert "was ended by SIGKILL" in line
    assert "the last line of its output: rank 2 begins" in line


def test_the_error_behind_closed_connections_is_named(start: Start) -> None:
    status, _, errors = start("error", processes=3, odd=1).end()
    assert status == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("llmtrain: ")]
    assert line.startswith("llmtrain: rank 1 on ")
    assert "failed with exit status 1: 'weights'" in line


def test_a_usage_error_of_all_ranks_is_printed_once(start: Start) -> None:
    status, _, errors = start("usage", restarts=1).end()
    assert status == 2
    assert errors.splitlines() == ["llmtrain: optimizer.lr=-1: must be positive"]


def test_a_usage_error_of_one_rank_names_it(start: Start) -> None:
    status, _, errors = start("usage of one", restarts=1).end()
    assert status == 2
    assert errors.startswith("llmtrain: data.path=x: no such file (rank 1 on ")
    assert len(errors.splitlines()) == 1


def test_other_ranks_are_ended_by_force(start: Start) -> None:
    """A rank that ignores nothing but sleeps, while another fails: SIGTERM; the job is over within seconds."""
    job = start("sleep", processes=2)
    first, second = job.pids(0, 1)
    job.wait_for("ready", 0, 1)
    os.kill(first, signal.SIGSTOP)  # SIGTERM has no effect on it
    os.kill(second, signal.SIGKILL)
    status, _, errors = job.end()
    assert status == 1
    assert "rank 1 on" in errors
    assert not is_running(first)


def test_a_rank_that_writes_a_checkpoint_is_not_killed(start: Start, tmp_path: Path) -> None:
    status, _, errors = start("save", GRACE="0.5").end()
    assert status == 1
    assert (tmp_path / "saved-1").exists()
    assert "rank 0 on" in errors
    assert "SIGKILL" in errors


def test_ranks_end_with_a_killed_supervisor(start: Start) -> None:
    job = start("sleep")
    pids = job.pids(0, 1)
    job.wait_for("ready", 0, 1)
    job.process.kill()
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "the ranks outlive their supervisor"
        time.sleep(0.02)


def test_a_failed_run_is_resumed(start: Start, tmp_path: Path) -> None:
    status, _, errors = start("restart", restarts=2, FAILURES="2", HAS_CONFIG="1").end()
    assert status == 0
    assert [(tmp_path / f"count-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert f"restart 1 of 2: 2 processes resume {tmp_path / 'run'}" in errors
    assert "restart 2 of 2: 2 processes resume" in errors
    assert errors.count("rank 1 on") == 2
    assert "SIGSEGV" in errors


def test_micro_batches_are_halved_where_memory_runs_out_on_a_rank(start: Start, tmp_path: Path) -> None:
    status, _, errors = start("memory").end()
    assert status == 0
    assert [(tmp_path / f"size-{size}-1").is_file() for size in (4, 2, 1)] == [True] * 3
    assert "micro-batches of 2 sequences from now on: 2 processes start anew" in errors
    assert "micro-batches of 1 sequence from now on" in errors
    assert "memory ran out with 4" in errors


def test_restarts_are_counted(start: Start, tmp_path: Path) -> None:
    status, _, _ = start("restart", restarts=1, FAILURES="9", HAS_CONFIG="1").end()
    assert status == 1
    assert (tmp_path / "count-1").read_text() == "2"


def test_what_a_failed_start_left_is_moved_aside(start: Start, tmp_path: Path) -> None:
    status, _, errors = start("restart", restarts=1, FAILURES="1", HAS_CONFIG="0").end()
    assert status == 0
    assert f"a start that failed has left no config in it; moved to {tmp_path / 'run.failed-1'}" in errors
    assert "restart 1 of 1: 2 processes start anew" in errors
    assert (tmp_path / "run").is_dir()
    assert (tmp_path / "run.failed-1").is_dir()
