"""Machines that do not come back before a restart, or fail again and again, and restarts with fewer ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain.distributed.hostfile import Host
from llmtrain.distributed.roster import Fewer, Roster, trimmed

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]
# As ssh does, but to this machine; host-b is off while there is a file
CONNECTION = (
    "sh -c 'test {host} = host-a || test ! -e FOLDER/off || { echo no route to {host} >&2; exit 255; }; "
    'exec sh -c "$1"\' sh'
)


class Job:
    """A supervisor of host-a, with one rank, and host-b, with two, of which rank 1 fails."""

    def __init__(self, folder: Path, restarts: int, **variables: str) -> None:
        self.folder = folder
        (folder / "hosts").write_text("host-a slots=1\nhost-b slots=2\n")
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {
            "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "HOSTFILE": str(folder / "hosts"), "HAS_CONFIG": "1",
            "CONNECTION": CONNECTION.replace("FOLDER", str(folder)), "FAILURES": "1",
        } | variables  # fmt: skip
        program = [str(HELPERS / "rank_program.py"), "restart", "1", str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, str(HELPERS / "supervise.py"), "3", str(restarts), *program], env=environment, cwd=folder,
            stdout=subprocess.PIPE, stderr=(folder / "errors").open("wb"),
        )  # fmt: skip

    def errors(self) -> str:
        return (self.folder / "errors").read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.errors():
            assert time.monotonic() < deadline, self.errors()
            assert self.process.poll() is None, self.errors()
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        status = self.process.wait(timeout=60)
        print(self.errors())
        return status, self.errors()

    def sizes(self, start: int) -> list[str]:
        """The number of ranks in a start, as each of them knew it."""
        return [path.read_text() for path in sorted(self.folder.glob(f"start-{start}-*"))]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(restarts: int = 1, **variables: str) -> Job:
        jobs.append(Job(tmp_path, restarts, **variables))
        return jobs[-1]

    yield make
    for job in jobs:
        job.process.kill()
        job.process.wait()


def test_a_run_goes_on_without_a_machine_that_stays_away(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start(LEAST="1", GOES_AWAY="1")
    status, errors = job.end()
    assert status == 0
    assert "rank 1 on host-b was ended by SIGSEGV" in errors
    assert "host host-b does not answer, and is left out of this start: no route to host-b" in errors
    assert f"restart 1 of 1: 1 process resumes {tmp_path / 'run'}" in errors
    assert (job.sizes(1), job.sizes(2)) == (["3", "3", "3"], ["1"])


def test_without_min_processes_all_machines_are_waited_for_and_needed(start: Callable[..., Job]) -> None:
    status, errors = start(GOES_AWAY="1").end()
    assert status == 1
    assert "waiting for host-b, 2 s at most: no route to host-b" in errors
    assert "no restart: 1 of 3 processes can be started; distributed.min_processes=N goes on with N or more" in errors


def test_too_few_processes_end_the_run(start: Callable[..., Job]) -> None:
    status, errors = start(LEAST="2", GOES_AWAY="1").end()
    assert status == 1
    assert "no restart: 1 of 3 processes can be started, fewer than distributed.min_processes=2" in errors


def test_a_machine_that_comes_back_takes_part(start: Callable[..., Job], tmp_path: Path) -> None:
    job = start(LEAST="1", GOES_AWAY="1", ABSENCE="60")
    job.wait_for("waiting for host-b, 60 s at most")
    (tmp_path / "off").unlink()
    status, errors = job.end()
    assert status == 0
    assert "restart 1 of 1: 3 processes resume" in errors
    assert job.sizes(2) == ["3", "3", "3"]


def test_a_machine_that_has_failed_twice_is_left_out(start: Callable[..., Job]) -> None:
    job = start(restarts=3, LEAST="1", FAILURES="2")
    status, errors = job.end()
    assert status == 0
    assert errors.count("llmtrain: host host-b has failed 2 times: left out from now on") == 1
    assert "restart 2 of 3: 1 process resumes" in errors
    assert [len(job.sizes(number)) for number in (1, 2, 3)] == [3, 3, 1]


def test_a_machine_that_is_needed_is_used_again(start: Callable[..., Job]) -> None:
    job = start(restarts=2, FAILURES="2")
    status, errors = job.end()
    assert status == 0
    assert "host host-b has failed 2 times, and cannot be left out: 1 of 3 processes can be started" in errors
    assert job.sizes(3) == ["3", "3", "3"]


def test_a_mesh_that_does_not_fit_ends_the_run_with_the_reason(start: Callable[..., Job]) -> None:
    status, errors = start(LEAST="1", MULTIPLE="3", GOES_AWAY="1").end()
    assert status == 1
    assert "no restart: 1 processes are left, and 1 is no multiple of 3" in errors


def test_a_signal_ends_the_wait_for_machines(start: Callable[..., Job]) -> None:
    job = start(GOES_AWAY="1", NEEDED="60")
    job.wait_for("waiting for host-b, 60 s at most")
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 128 + signal.SIGTERM


# --- without processes of ranks ---------------------------------------------------------------------------------------


def test_the_largest_part_of_the_machines_that_makes_a_mesh_is_taken() -> None:
    lines: list[str] = []
    fewer = Fewer(4, lambda number: "odd" if number % 4 else None)
    roster = Roster([Host("", 8), Host("localhost", 6)], fewer, say=lines.append)
    assert roster.next_hosts() == [Host("", 8), Host("localhost", 4)]
    assert trimmed([Host("a", 2), Host("b", 2), Host("c", 2)], 3) == [Host("a", 2), Host("b", 1)]
    assert lines == []


def test_failures_of_several_machines_at_once_count_for_none() -> None:
    roster = Roster([Host("a", 1), Host("b", 1)])
    roster.record_failure(["a", "b"])
    roster.record_failure(["b", "b"])
    assert dict(roster.failures) == {"b": 1}


def test_a_process_is_left_out_with_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("""#!/bin/sh
        for number in 0 1 2; do echo "GPU $number: NVIDIA H200 (UUID: GPU-$number)"; done
        echo 'Unable to determine the device handle for GPU3: 0000:9A:00.0: Unknown Error'
        exit 255
        """)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lines: list[str] = []
    assert Roster([Host("", 4)], Fewer(1, on_gpus=True), say=lines.append).next_hosts() == [Host("", 3)]
    assert lines == ["llmtrain: this machine has 3 GPUs left of 4"]
    assert Roster([Host("", 4)], Fewer(1, on_gpus=False)).next_hosts() == [Host("", 4)]
    assert Roster([Host("", 4)], Fewer(None, on_gpus=True)).next_hosts() == [Host("", 4)]
