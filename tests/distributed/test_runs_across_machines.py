"""Real runs on two machines, network namespaces with names of their own: by a hostfile, and by torchrun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.test_two_machines import FIRST, SECOND, ip, link
from tests.distributed.whole_runs import RUN, rows

__all__ = ["link"]  # the fixture
SECONDS = 400
TIMEOUT = 45.0  # a busy machine imports for long
TRAINING = (*RUN, "loop.max_steps=16", "loop.eval_every=0", "loop.sample_every=0", "checkpoint.every_steps=1",
            f"distributed.timeout_seconds={TIMEOUT:g}")  # fmt: skip
# As ssh does: HOST SCRIPT; a machine that is off does not answer
CONNECT = """#!/bin/sh
test ! -e off-$1 || { echo "connect to host $1: No route to host" >&2; exit 255; }
exec ip netns exec "$1" unshare --uts sh -c 'echo $0 > /proc/sys/kernel/hostname; exec sh -c "$1"' "$1" "$2"
"""

pytestmark = pytest.mark.slow


class Cluster:
    """Two machines, and the commands that run on them."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        text = "".join(f"Line {number} of a text that is not long.\n" for number in range(900))
        (folder / "text.txt").write_text(text)
        (folder / "hosts").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
        (folder / "connect").write_text(CONNECT)
        (folder / "connect").chmod(0o755)
        self.hosts = ("distributed.hostfile=hosts", f"distributed.ssh={folder}/connect {{host}}")
        self.environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
        self.environment |= {"LLMTRAIN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, output: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / output).open("wb") as file:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=file, stderr=file,
                                       start_new_session=True)  # fmt: skip
        self.processes.append(process)
        return process

    def llmtrain(self, output: str, *words: str) -> subprocess.Popen[bytes]:
        return self.start(output, sys.executable, "-m", "llmtrain", *words)

    def text(self, output: str) -> str:
        return (self.folder / output).read_text(errors="replace")

    def end(self, process: subprocess.Popen[bytes], output: str) -> tuple[int, str]:
        status = process.wait(timeout=SECONDS)
        print(self.text(output))
        return status, self.text(output)

    def wait_for_step(self, run: str, step: int, process: subprocess.Popen[bytes], output: str) -> None:
        deadline = time.monotonic() + SECONDS
        metrics = self.folder / run / "metrics.jsonl"
        while not (metrics.is_file() and step in rows(metrics.parent)):
            assert time.monotonic() < deadline, self.text(output)
            assert process.poll() is None, self.text(output)
            time.sleep(0.05)

    def set_link(self, state: str) -> None:
        ip("-n", FIRST, "link", "set", self.device, state)

    def switch_off(self, host: str) -> None:
        """End all processes of a machine at once; it does not answer any more."""
        (self.folder / f"off-{host}").touch()
        pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True, timeout=10)
        for pid in map(int, pids.stdout.split()):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def cluster(link: str, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, link)
    yield cluster
    for process in cluster.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for host in (FIRST, SECOND):
        cluster.switch_off(host)


def losses(run: Path) -> list[float]:
    return [row["loss"] for _, row in sorted(rows(run).items())]


def test_a_run_whose_link_is_cut_ends_and_resumes(cluster: Cluster, tmp_path: Path) -> None:
    process = cluster.llmtrain("cut.txt", "train", "run_dir=cut", *TRAINING, "distributed=fsdp", *cluster.hosts)
    cluster.wait_for_step("cut", 4, process, "cut.txt")
    cluster.set_link("down")
    cut = time.monotonic()
    status, text = cluster.end(process, "cut.txt")
    print(f"ended {time.monotonic() - cut:.1f} s after the cut, with a time-out of {TIMEOUT:g} s")
    assert status == 1
    assert f"no heartbeat from rank 1 on host {SECOND} for" in text
    assert max(rows(tmp_path / "cut")) < 16
    cluster.set_link("up")
    resumed = cluster.llmtrain("resumed.txt", "resume", "cut", *cluster.hosts)
    assert cluster.end(resumed, "resumed.txt")[0] == 0
    whole = cluster.llmtrain("whole.txt", "train", "run_dir=whole", *TRAINING, "distributed=fsdp", *cluster.hosts)
    assert cluster.end(whole, "whole.txt")[0] == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")  # bit for bit


def test_a_run_goes_on_without_a_machine_that_is_switched_off(cluster: Cluster, tmp_path: Path) -> None:
    process = cluster.llmtrain("off.txt", "train", "run_dir=off", *TRAINING, "distributed=ddp", *cluster.hosts,
                               "distributed.restarts=1", "distributed.min_processes=1")  # fmt: skip
    cluster.wait_for_step("off", 4, process, "off.txt")
    cluster.switch_off(SECOND)
    status, text = cluster.end(process, "off.txt")
    assert status == 0
    assert f"rank 1 on {SECOND}" in text
    assert f"host {SECOND} does not answer, and is left out of this start: connect to host" in text
    assert "restart 1 of 1: 1 process resumes" in text
    one = cluster.llmtrain("one.txt", "train", "run_dir=one", *TRAINING)
    assert cluster.end(one, "one.txt")[0] == 0
    assert losses(tmp_path / "off") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_run_under_torchrun_whose_link_is_cut_ends(cluster: Cluster, tmp_path: Path) -> None:
    outputs = {FIRST: "first.txt", SECOND: "second.txt"}
    agents = {
        host: cluster.start(
            output, str(tmp_path / "connect"), host,
            f"exec {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d "
            f"--rdzv-endpoint {FIRST}:29400 --rdzv-id cut --local-addr {host} -m llmtrain train run_dir=run "
            + " ".join((*TRAINING, "distributed=ddp")),
        )
        for host, output in outputs.items()
    }  # fmt: skip
    cluster.wait_for_step("run", 4, agents[FIRST], "first.txt")
    cluster.set_link("down")
    cut = time.monotonic()
    status, text = cluster.end(agents[FIRST], outputs[FIRST])
    print(f"ended {time.monotonic() - cut:.1f} s after the cut, with a time-out of {TIMEOUT:g} s")
    assert status == 1
    assert f"no heartbeat from rank 1 on host {SECOND} for" in text
    log = tmp_path / "run" / "ranks" / "rank-00001.log"
    deadline = time.monotonic() + SECONDS
    while f"no answer from rank 0 (host {FIRST})" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    os.killpg(agents[SECOND].pid, signal.SIGKILL)  # the agent waits for its store, which it cannot reach, for long
    agents[SECOND].wait()
    cluster.set_link("up")
    resumed = cluster.llmtrain("resumed.txt", "resume", "run", *cluster.hosts)
    assert cluster.end(resumed, "resumed.txt")[0] == 0
    assert sorted(rows(tmp_path / "run")) == list(range(1, 17))
