"""Ranks on several hosts: the file that names them, and a supervisor with a connection to each rank.

A connection is a command that runs a shell script, as ``ssh HOST`` does; here ``env HOST=… sh -c``.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.distributed.hostfile import Host, read_hostfile
from llmtrain.distributed.remote_rank import SSH, connection_command
from tests.helpers.processes import is_running

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]


def test_hosts_are_read_with_their_slots(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nhost-a slots=8\n\n  user@10.0.0.2   slots=4 max_slots=8  # old\nhost-c:2\n")
    assert read_hostfile(file) == [Host("host-a", 8), Host("user@10.0.0.2", 4), Host("host-c", 2)]
    assert read_hostfile(file)[1].address == "10.0.0.2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\na slots=2\n", "line 2: a is in line 1 already; give its ranks in one line: a slots=N"),
        ("\nhost\n", "line 2: host: the number of ranks is missing: host slots=8"),
        ("a slots=two\n", "line 1: slots=two: must be a whole number, 1 to 4096"),
        ("a slots=0\n", "line 1: slots=0"),
        ("a slots=2 gpus=2\n", "line 1: gpus=2: not understood"),
        ("a slots=4 max_slots=2\n", "line 1: max_slots=2"),
        ("-oProxyCommand=x slots=2\n", "line 1: -oProxyCommand=x: no name of a host"),
        ("a;reboot slots=2\n", "line 1: a;reboot: no name of a host"),
        ("# nothing\n", "names no host"),
        ("localhost slots=2\nb slots=2\n", "line 1: localhost: the other hosts cannot reach this one by that name"),
    ],
)
def test_mistakes_in_a_hostfile_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_hostfile(file)


def test_a_hostfile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hosts: No such file or directory; it has a line for each host"):
        read_hostfile(tmp_path / "hosts")


def test_the_command_of_a_connection_names_the_host() -> None:
    assert connection_command(SSH, "user@b")[-1] == "user@b"
    assert connection_command("ip netns exec {host} sh -c", "b") == ["ip", "netns", "exec", "b", "sh", "-c"]
    with pytest.raises(ValueError, match=re.escape("distributed.ssh=ssh -p 22: has no {host}")):
        connection_command("ssh -p 22", "b")


class Hosts:
    """A supervisor of two hosts."""

    def __init__(self, folder: Path, behaviour: str, ssh: str = "env HOST={host} sh -c", **variables: str) -> None:
        self.folder = folder
        file = folder / "hosts"
        file.write_text("host-a slots=1\nhost-b slots=2\n")
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {
            "TMPDIR": str(folder),
            "PYTHONPATH": str(ROOT),
            "HOSTFILE": str(file),
            "CONNECTION": ssh,
        } | variables
        program = [str(HELPERS / "rank_program.py"), behaviour, "1", str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, str(HELPERS / "supervise.py"), "3", "0", *program], env=environment, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def read(self, name: str, rank: int) -> str:
        deadline = time.monotonic() + 20
        while not (self.folder / f"{name}-{rank}").exists():
            assert time.monotonic() < deadline, f"no {name}: {self.process.communicate(timeout=5)}"
            time.sleep(0.02)
        return (self.folder / f"{name}-{rank}").read_text()

    def end(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=40)
        return self.process.returncode, output, errors


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    started: list[Hosts] = []

    def make(*arguments: str, **variables: str) -> Hosts:
        started.append(Hosts(tmp_path, *arguments, **variables))
        return started[-1]

    yield make
    for job in started:
        job.process.kill()
        job.process.wait()


def test_ranks_on_other_hosts_have_their_places_and_get_signals_once(start) -> None:
    job = start("stop")
    for rank, (local_rank, local_size) in enumerate([(0, 1), (0, 2), (1, 2)]):
        place = dict(entry.split("=") for entry in job.read("started", rank).split())
        assert (place["RANK"], place["WORLD_SIZE"], place["MASTER_ADDR"]) == (str(rank), "3", "host-a")
        assert (place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"]) == (str(local_rank), str(local_size))
        assert int(place["OMP_NUM_THREADS"]) >= 1
        job.read("ready", rank)
    job.process.send_signal(signal.SIGTERM)
    status, _, errors = job.end()
    assert status == 75
    assert errors.splitlines() == ["rank 0 begins"]
    assert [job.read("received", rank) for rank in range(3)] == ["15"] * 3


def test_a_rank_that_is_killed_on_another_host_is_named(start) -> None:
    status, _, errors = start("killed").end()
    assert status == 1
    line = errors.splitlines()[-1]
    assert line.startswith("llmtrain: rank 1 on host-b was ended by SIGKILL"), errors


def test_the_words_of_a_rank_on_another_host_are_reported(start) -> None:
    status, _, errors = start("error").end()
    assert status == 1
    assert "llmtrain: rank 1 on host-b failed with exit status 1: 'weights'" in errors


def test_a_host_that_cannot_be_reached_is_named(start) -> None:
    status, _, errors = start("sleep", "sh -c 'test {host} = host-a || { echo no route to {host} >&2; exit 255; }; "
                              'exec sh -c "$1"\' sh').end()  # fmt: skip
    assert status == 1
    assert "rank 1 on host-b failed with exit status 1: the connection to host host-b is lost" in errors
    assert "exit status 255: no route to host-b" in errors


def test_ranks_on_other_hosts_end_with_their_connection(start) -> None:
    job = start("sleep")
    pids = [int(job.read("pid", rank)) for rank in range(3)]
    for rank in range(3):
        job.read("ready", rank)
    job.process.kill()
    deadline = time.monotonic() + 8
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "the ranks outlive their supervisor"
        time.sleep(0.05)


def test_a_save_on_another_host_is_not_cut_off(start, tmp_path: Path) -> None:
    status, _, _ = start("save", GRACE="0.5").end()
    assert status == 1
    assert (tmp_path / "saved-1").exists()
