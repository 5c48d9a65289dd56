"""Whole runs through the command line, for benchmarks that compare runs."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class RunFailed(RuntimeError):
    """A run that ended with another status than 0; the message is its last line."""


def train(folder: Path, name: str, overrides: Sequence[str]) -> Path:
    """Train the run ``name`` in ``folder``, with a data cache there; return its directory.  Raises RunFailed."""
    command = [sys.executable, "-m", "llmtrain", "train", f"run_dir='{name}'", *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"LLMTRAIN_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise RunFailed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return folder / name


def rows_of(run: Path) -> list[dict[str, Any]]:
    """All rows of the metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The rows of steps."""
    return [row for row in rows_of(run) if "grad_norm" in row and "event" not in row]
