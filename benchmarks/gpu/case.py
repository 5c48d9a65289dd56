"""A case: one command in a process of its own, with its own time limit, and the row that becomes of it."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROW = "ROW "  # a line of a worker's output that is a row of the table: JSON follows
SAID_LINES = 8
PATIENCE = 3  # times the limits, of cases and parts, where there is no GPU: they are for a machine that has one
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """The machine and the arguments of a part."""

    out: Path  # of runs, logs and results
    rehearses: bool  # small sizes, on a CPU too
    machine: Mapping[str, Any]  # of `machine.py`
    nanogpt: str | None = None
    peer_python: str = sys.executable  # of the peers

    @property
    def has_gpu(self) -> bool:
        return self.machine["device"] == "cuda"

    @property
    def patience(self) -> int:
        """What limits are multiplied by."""
        return 1 if self.has_gpu else PATIENCE

    @property
    def peak_flops(self) -> float | None:
        """bf16, of the data sheet."""
        return self.machine.get("peak_flops")


@dataclass(frozen=True)
class Case:
    """A command; ``{run}`` in it is the folder of the run and ``{out}`` that of the results."""

    name: str
    command: tuple[str, ...]  # behind the interpreter
    seconds: float = 90.0  # limit
    status: int = 0  # expected
    needs_gpu: bool = True  # in a rehearsal without one: `rehearsal`, or left out
    rehearsal: tuple[str, ...] = ()  # the command in its place
    alone: bool = True  # no other case beside it
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Path, str, Row], list[Row]] = lambda run, output, row: [row]  # completes the row; more may follow


def train(name: str, *overrides: str, **options: Any) -> Case:
    """A run of the real command.  Without a GPU a rehearsal only composes what needs one."""
    command = ("-m", "llmtrain", "train", *overrides, "run_dir='{run}'")
    options.setdefault("read", read_run)
    return Case(name, command, rehearsal=(*command, "--cfg", "job"), **options)


def worker(name: str, module: str, *arguments: str, **options: Any) -> Case:
    """A script of this folder, which prints rows."""
    return Case(name, ("-m", f"benchmarks.gpu.{module}", *arguments), read=read_rows, **options)


def run_case(case: Case, setup: Setup, seconds: float) -> list[Row]:
    """Run the case for at most ``seconds``; whatever goes wrong becomes a row too."""
    command, is_composed = case.command, False
    if case.needs_gpu and not setup.has_gpu:
        command, is_composed = case.rehearsal, True
    run = setup.out / "runs" / "".join(c if c.isalnum() else "-" for c in case.name)
    places = {"{run}": str(run), "{out}": str(setup.out)}
    for place, path in places.items():
        command = tuple(part.replace(place, path) for part in command)
    row: Row = {"case": case.name, "command": " ".join(["python", *command])}
    if not command:
        return [row | {"status": "left out", "said": ["needs a GPU"]}]
    shutil.rmtree(run, ignore_errors=True)
    limit, begun = min(case.seconds * setup.patience, seconds), time.monotonic()
    returncode, output = execute([case.python, *command], limit, environment_of(case, setup))
    row |= {"seconds": round(time.monotonic() - begun, 1), "exit_status": returncode}
    if returncode is None:
        row["status"] = "timeout"
        output += f"\nended after {limit:.0f} s"
    else:
        row["status"] = "ok" if returncode == case.status else "failed"
    rows = [row]
    if is_composed:
        row["status"] = "composed" if row["status"] == "ok" else row["status"]
    else:
        try:
            rows = case.read(run, output, row)
        except Exception as error:  # the program's files are not as expected: that is a finding
            row |= {"status": "failed", "problem": f"unreadable results: {type(error).__name__}: {error}"}
    if row["status"] in ("failed", "timeout"):
        row["said"] = [line.rstrip()[:300] for line in output.splitlines() if line.strip()][-SAID_LINES:]
        (setup.out / "logs").mkdir(exist_ok=True)
        (setup.out / "logs" / f"{run.name}.txt").write_text(output)
    for checkpoint in run.glob("checkpoints/*"):  # tens of GB, with the large models
        shutil.rmtree(checkpoint, ignore_errors=True)
    return rows


def environment_of(case: Case, setup: Setup) -> dict[str, str]:
    """One cache of data and compiled code for all cases, in the folder of the results."""
    cache = setup.out / "cache"
    own = {
        "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "LLMTRAIN_CACHE": str(cache / "data"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"),
        "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "1", "COLUMNS": "160",
    }  # fmt: skip
    return os.environ | own | dict(case.environment)


def execute(command: list[str], seconds: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Return exit status (None: out of time) and output; nothing of the command is left behind."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        end(process)
        output, _ = process.communicate()
        return None, output
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# --- results ---------------------------------------------------------------------------------------------------------


def read_run(run: Path, output: str, row: Row) -> list[Row]:
    """Complete the row with the run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] if run.exists() else []
    logged = [one for one in rows if "tokens_per_second" in one and "event" not in one]
    measured = logged[2:] or logged[-1:]  # after what is compiled, and what is allocated
    if measured:
        row["tokens_per_second"] = round(statistics.median(one["tokens_per_second"] for one in measured))
        row["mfu"] = statistics.median(one["mfu"] for one in measured if one.get("mfu") is not None) if all(
            one.get("mfu") is not None for one in measured) else None  # fmt: skip
        row["memory_bytes"] = max(one["memory_bytes"] for one in logged)
        row["loss"] = logged[-1]["loss"]
    row["events"] = [
        f"{one['event']}: {str(one.get('message', ''))[:160]}" for one in rows
        if one.get("event") in ("micro_batch", "compiled", "out_of_memory", "notice", "fallback", "save_failed")
    ]  # fmt: skip
    for profile in run.glob("profile/*/operations.txt"):
        shutil.copy(profile, run.parent.parent / f"operations-{run.name}.txt")
    return [row]


def read_rows(run: Path, output: str, row: Row) -> list[Row]:
    """The rows that a worker printed, behind the one of its process; a failed one fails the whole."""
    rows = [json.loads(line.removeprefix(ROW)) for line in output.splitlines() if line.startswith(ROW)]
    rows = [{"status": "ok"} | found | {"case": f"{row['case']}: {found['case']}"} for found in rows]
    if row["status"] == "ok" and not rows:
        row |= {"status": "failed", "problem": "no rows"}
    return [row, *rows]


def print_row(case: str, **values: Any) -> None:
    """A worker's row."""
    print(ROW + json.dumps({"case": case, **values}), flush=True)
