"""Runs under torchrun, whose agents start the same command again: the run that an earlier start has made is resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.distributed.launch import free_port
from tests.distributed.whole_runs import RUN, process_of_rank, rows, start

SECONDS = 300
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LONG = (*RUN, "loop.max_steps=16", "loop.eval_every=0", "loop.sample_every=0", "checkpoint.every_steps=1",
        "checkpoint.keep_last=100", "distributed.timeout_seconds=60")  # fmt: skip


class Agent:
    """An agent of torchrun, and its output."""

    def __init__(self, folder: Path, name: str, *words: str, **variables: str) -> None:
        self.output = folder / f"{name}.txt"
        environment = os.environ | {"LLMTRAIN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"} | variables
        with self.output.open("wb") as file:
            self.process = subprocess.Popen([*TORCHRUN, *words], cwd=folder, env=environment, stdout=file, stderr=file,
                                            start_new_session=True)  # fmt: skip

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + SECONDS
        while not (found := condition()):
            assert time.monotonic() < deadline, self.text()
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)
        return found

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def end(self) -> tuple[int, str]:
        status = self.process.wait(timeout=SECONDS)
        print(self.text())
        return status, self.text()

    def kill(self) -> None:
        """End the agent and its ranks at once, as a machine that is switched off."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in (self.process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    (tmp_path / "text.txt").write_text("".join(f"Line {number} of a text that is not long.\n" for number in range(900)))
    started: list[Agent] = []

    def make(*words: str, **variables: str) -> Agent:
        started.append(Agent(tmp_path, f"agent-{len(started)}", *words, **variables))
        return started[-1]

    yield make
    for agent in started:
        print(f"--- {agent.output.name}\n{agent.text()[-3000:]}")
        if agent.process.poll() is None:
            agent.kill()


def find_run(folder: Path) -> Path | None:
    """The one run in ``folder``, once it has a config."""
    found = [path.parent for path in folder.glob("runs/*/*/config.yaml")]
    assert len(found) < 2, found
    return found[0] if found else None


def has_step(folder: Path, step: int) -> bool:
    run = find_run(folder)
    return run is not None and (run / "metrics.jsonl").is_file() and step in rows(run)


def logged_steps(run: Path) -> list[int]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in found if "grad_norm" in row and "event" not in row]


def test_a_restart_under_torchrun_resumes_the_run(agents: Callable[..., Agent], tmp_path: Path) -> None:
    agent = agents("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "llmtrain", "train", *LONG,
                   "distributed=fsdp")  # fmt: skip
    agent.wait_for(lambda: has_step(tmp_path, 3))
    run = find_run(tmp_path)
    assert run is not None
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    status, text = agent.end()
    assert status == 0
    assert f"a later start of this job: resumes {run}" in text
    assert find_run(tmp_path) == run  # and no other was made
    assert logged_steps(run) == list(range(1, 17))
    (resume,) = json.loads((run / "environment.json").read_text())["resumes"]
    assert resume["step"] >= 1
    whole = start(tmp_path, "train", "run_dir=whole", *LONG, "distributed=fsdp", "distributed.processes=2")
    _, errors = whole.communicate(timeout=SECONDS)
    assert whole.returncode == 0, errors
    losses = [[row["loss"] for row in rows(each).values()] for each in (run, tmp_path / "whole")]
    assert losses[0] == losses[1]  # bit for bit


def test_a_mistake_is_one_at_every_start(agents: Callable[..., Agent], tmp_path: Path) -> None:
    """A directory that was there before the job is not resumed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("x")
    status, text = agents("--standalone", "--nproc-per-node", "1", "--max-restarts", "1", "-m", "llmtrain", "train",
                          *LONG, "run_dir=mine").end()  # fmt: skip
    assert status == 1
    assert text.count("run_dir=mine: exists already") == 2
    assert (tmp_path / "mine" / "config.yaml").read_text() == "x"


@pytest.mark.slow
def test_a_run_goes_on_with_the_machines_that_there_are(agents: Callable[..., Agent], tmp_path: Path) -> None:
    """Of two machines one is switched off, and another one comes later: agents with a rank each.

    Torch 2.13 lets none join in its default: the newcomer waits for the address of a store that nobody tells it.
    """
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    place = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint",
             f"localhost:{free_port()}", "--rdzv-id", "job", "--max-restarts", "3")  # fmt: skip
    conf = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5,is_host="
    command = ("-m", "llmtrain", "train", *LONG, "loop.max_steps=4000", "distributed=fsdp")
    # the first has the store of the rendezvous, and is not switched off
    left, gone = (agents(*place, "--rdzv-conf", f"{conf}{has}", *command, **own) for has in ("true", "false"))
    left.wait_for(lambda: has_step(tmp_path, 3))
    run = find_run(tmp_path)
    assert run is not None

    def processes() -> list[int]:
        record = json.loads((run / "environment.json").read_text())
        return [record["processes"], *(each["processes"] for each in record.get("resumes", []))]

    assert list(tmp_path.glob("runs/.torchrun-job.json"))
    gone.kill()
    left.wait_for(lambda: len(processes()) > 1)
    assert processes() == [2, 1]
    newest = max(logged_steps(run))
    left.wait_for(lambda: max(logged_steps(run)) > newest)
    agents(*place, "--rdzv-conf", f"{conf}false", *command, **own)
    left.wait_for(lambda: len(processes()) > 2)
    assert processes() == [2, 1, 2]
    newest = max(logged_steps(run))
    left.wait_for(lambda: max(logged_steps(run)) > newest)
    steps = logged_steps(run)
    assert steps == list(range(1, len(steps) + 1))
    assert find_run(tmp_path) == run
