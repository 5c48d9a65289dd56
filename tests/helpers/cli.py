"""Running the real command line in tests."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers.launcher import Launcher

TINY = (
    "model=tiny", "tokenizer=byte", "data.sequence_length=32", "runtime.num_threads=1", "metrics.log_every=1",
    "accumulation.batch_size=4", "accumulation.micro_batch_size=4", "loop.eval_every=0", "loop.sample_every=0",
)  # fmt: skip


def llmtrain(
    *arguments: str,
    cwd: Path,
    check: int | None = 0,
    env: Mapping[str, str] | None = None,
    file_bytes: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, which :mod:`launcher` forks: starting Python and torch takes seconds.

    ``env`` is added to the environment, ``file_bytes`` limits the length of files that it writes.
    """
    if sys.platform != "linux":
        assert file_bytes is None
        command = [sys.executable, "-m", "llmtrain", *arguments]
        environment = os.environ | dict(env or {})
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    else:
        victim = launcher().start(*arguments, cwd=cwd, environment=env, file_bytes=file_bytes, apart=True)
        victim.wait(seconds=300)
        output, errors = victim.output.read_text(), victim.errors.read_text()
        done = subprocess.CompletedProcess(arguments, victim.returncode, output, errors)
        victim.output.unlink()
        victim.errors.unlink()
    if check is not None:
        assert done.returncode == check, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@functools.cache
def launcher() -> Launcher:
    """The one of this process, which ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="llmtrain-tests-"))
    started = Launcher(folder)
    atexit.register(shutil.rmtree, folder)
    atexit.register(started.close)
    return started


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the command, as a user does, and go on."""
    command = [sys.executable, "-m", "llmtrain", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def only_run(folder: Path) -> Path:
    """The one run directory below ``folder``."""
    (config,) = folder.glob("*/*/config.yaml")
    return config.parent


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics rows of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def cut_back(run_dir: Path, step: int, to: Path) -> Path:
    """A copy of ``run_dir`` as a kill right after the checkpoint of ``step`` would have left it."""
    shutil.copytree(run_dir, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (to / "summary.json").unlink(missing_ok=True)
    return to


def assert_same_end(one: Path, other: Path) -> None:
    """Both runs' last checkpoints hold the same bits: weights, optimizer, counters, generators."""
    first, second = (sorted((run / "checkpoints").iterdir())[-1] for run in (one, other))
    assert first.name == second.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        for key in left:
            bits = (tensors[key].reshape(-1).view(torch.uint8) for tensors in (left, right))  # numpy has no bf16
            assert torch.equal(*bits), f"{name}: {key} differs"
    left, right = (json.loads((path / "state.json").read_text()) for path in (first, second))
    left.pop("train_seconds"), right.pop("train_seconds")
    assert left == right


def environment(**changes: str) -> dict[str, str]:
    """The environment with ``changes``."""
    return os.environ | changes
