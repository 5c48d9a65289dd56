"""One measurement: a worker in a fresh process, and what came of it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import MARK

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]  # suite, group, contestant, round, precision, and one of: result, absent, error


@dataclass(frozen=True)
class Measurement:
    """What to run; ``group`` names those that are compared with one another."""

    suite: str
    group: str
    contestant: str
    worker: str  # module in benchmarks/workers
    task: Task
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    emptied: Path | None = None  # a folder to be emptied before

    def run(self, number: int, timeout_seconds: float) -> list[Record]:
        """Run it; a record for each row of the result.  Whatever goes wrong becomes a record too."""
        if self.emptied is not None:
            shutil.rmtree(self.emptied, ignore_errors=True)
        before = cpu_seconds_of_others()
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(dir=self.task.folder) as folder:
            result = self._run_in(folder, timeout_seconds)
        common = {"suite": self.suite, "group": self.group, "round": number, "precision": self.task.precision}
        if before is not None:
            taken = (cpu_seconds_of_others() or before) - before
            common["cores_of_others"] = round(max(taken, 0.0) / (time.monotonic() - begun), 2)
        if "rows" not in result:
            outcome = result if result.keys() & {"absent", "error"} else {"result": result}
            return [common | {"contestant": self.contestant} | outcome]
        versions = {"versions": result.get("versions", {})}
        return [common | {"contestant": name, "result": row | versions} for name, row in result["rows"].items()]

    def _run_in(self, folder: str, timeout_seconds: float) -> dict[str, Any]:
        # This process stays small and never imports torch: the kernel lets a child's peak memory begin at its parent's.
        task = replace(self.task, folder=folder, launched=time.time())
        command = [self.python, "-m", f"benchmarks.workers.{self.worker}", task.to_json()]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | dict(self.environment)
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            return {"absent": f"{self.python}: {error.strerror}"}
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {timeout_seconds:g} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it may have left
            process.wait()
        lines = [line for line in output.splitlines() if line.startswith(MARK)]
        if process.returncode == 0 and lines:
            return json.loads(lines[-1].removeprefix(MARK))
        said = [line.strip() for line in output.splitlines() if line.strip()]
        return {
            "error": f"exit status {process.returncode}: {said[-1] if said else ''}"[:500],
            "output": output[-4000:],
        }


def cpu_seconds_of_others() -> float | None:
    """CPU time that the machine has spent on anything but this process and what it started, or was denied; Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    ours = os.times()
    return busy - ours.user - ours.system - ours.children_user - ours.children_system
