"""Time to the first step of ours: the real ``llmtrain train`` on a data set that is in the cache."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import serve
from benchmarks.workers.ours import overrides

POLL_SECONDS = 0.005
PATIENCE_SECONDS = 900


def measure(task: Task) -> dict[str, Any]:
    """From the start of the command to the first row of its metrics, which the end of the first step writes."""
    folder = Path(task.folder)
    metrics = folder / "run" / "metrics.jsonl"
    arguments = [*overrides(task), "loop.max_steps=1000000"]
    launched = time.time()
    with (folder / "output.txt").open("w+") as output:
        command = [sys.executable, "-m", "llmtrain", "train", *arguments]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
        try:
            while not (row := first_row(metrics)):
                if process.poll() is not None or time.time() - launched > PATIENCE_SECONDS:
                    output.seek(0)
                    raise RuntimeError(f"no first step: {output.read()[-2000:]}")
                time.sleep(POLL_SECONDS)
            seconds = time.time() - launched
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # no checkpoint is wanted
            process.wait()
    note = "the command itself: it also lints the run, makes its directory and measures the machine's peak"
    return {"first_step_seconds": seconds, "memory_bytes": row["memory_bytes"], "note": note}


def first_row(metrics: Path) -> dict[str, Any] | None:
    """The first step's row, once it is there."""
    try:
        lines = metrics.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    rows = (json.loads(line) for line in lines if line.endswith("\n"))
    return next((row for row in rows if "loss" in row and "event" not in row), None)


if __name__ == "__main__":
    serve(measure, "torch", "llmtrain")
