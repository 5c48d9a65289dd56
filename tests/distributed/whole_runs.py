"""Whole runs of several ranks through the command line, for tests of this folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cli

RUN = (
    "model=llama_tiny", "tokenizer=byte", "data=text", "data.path=text.txt", "data.sequence_length=32",
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2",
    "accumulation.batch_size=5", "accumulation.micro_batch_size=2", "loop.max_steps=12", "loop.eval_every=6",
    "loop.eval_batches=3", "loop.sample_every=12", "loop.sample_tokens=2", "checkpoint.every_steps=6",
    "metrics.log_every=1", "precision=fp32", "schedule=constant", "schedule.warmup_steps=0", "runtime.num_threads=1",
)  # fmt: skip
TWO = "distributed.processes=2"
SECONDS = 300


def write_text(folder: Path) -> None:
    """Write the ``text.txt`` that :data:`RUN` trains on."""
    (folder / "text.txt").write_text("".join(f"Line {number} of a text that is not long.\n" for number in range(900)))


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"LLMTRAIN_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "llmtrain", *words], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def llmtrain(folder: Path, *words: str, check: int = 0) -> subprocess.CompletedProcess[str]:
    return cli.llmtrain(*words, cwd=folder, check=check, env={"LLMTRAIN_CACHE": str(folder / "cache")})


def rows(run: Path) -> dict[int, dict[str, Any]]:
    """The last row of each step."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in found if "grad_norm" in row and "event" not in row}


def validations(run: Path) -> dict[int, float]:
    """The validation loss by step."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["val_loss"] for row in found if "val_loss" in row}


def assert_same_validations(folder: Path, run: str) -> None:
    """At the steps of ``one``; a run that stopped in between was validated there, too."""
    one, other = validations(folder / "one"), validations(folder / run)
    assert len(one) >= 2
    assert {step: other[step] for step in one} == pytest.approx(one, rel=1e-5)


def assert_same_training(folder: Path, run: str, steps: range = range(1, 13)) -> None:
    one, other = rows(folder / "one"), rows(folder / run)
    assert sorted(other) == list(range(1, steps.stop))
    for step in steps:
        for key in ("loss", "grad_norm"):
            assert other[step][key] == pytest.approx(one[step][key], rel=1e-5), (step, key)
        for key in ("tokens", "batch_size", "epoch", "position", "learning_rate"):
            assert other[step][key] == one[step][key], (step, key)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and step in rows(run):
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    output, errors = process.communicate()
    pytest.fail(f"no step {step}: {output}\n{errors}")


def process_of_rank(run: Path, rank: int) -> int:
    """The number of a rank's process, by the first line of its log."""
    head = (run / "ranks" / f"rank-{rank:05d}.log").read_text().splitlines()
    return int(next(line for line in reversed(head) if ", process " in line).split(", process ")[1].split(",")[0])
