"""A rank on another machine, over ssh: its agent there starts it, passes signals on and ends it with the connection.

Importing this module does not import torch.
"""

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.base.invocation import FAILED
from llmtrain.distributed.rank_process import RankProcess, end_with_parent
from llmtrain.distributed.supervision import Failure, Kind, log_name

SSH = "ssh -o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3 {host}"
AGENT = "llmtrain.distributed.agent"
# Variables of this machine that hold on the others, too; CUDA_VISIBLE_DEVICES does not.
SHARED = (
    "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "OMP_", "MKL_", "UCX_", "FI_", "LLMTRAIN_", "HF_",
    "WANDB_", "MLFLOW_", "TOKENIZERS_", "PYTHONPATH", "PYTHONUNBUFFERED", "PATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "GLIBC_TUNABLES",
)  # fmt: skip
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAST_CHANCE_SECONDS = 2.0  # for the agent to kill the rank, before the connection is ended


def connection_command(ssh: str, host: str) -> list[str]:
    """The words of the command to which a script for ``host`` is appended.  Raises ValueError without ``{host}``."""
    try:
        words = shlex.split(ssh)
    except ValueError as error:
        raise ValueError(f"distributed.ssh={ssh}: {error}") from None
    if not any("{host}" in word for word in words):
        raise ValueError(f"distributed.ssh={ssh}: has no {{host}}, the place of the host's name; for example: {SSH}")
    return [word.replace("{host}", host) for word in words]


class RemoteRank(RankProcess):
    """A rank on another machine, as its agent reports it."""

    def __init__(self, rank: int, host: str, command: Sequence[str], environment: Mapping[str, str], folder: Path,
                 *, ssh: str = SSH, shows_output: bool, shares_threads: bool) -> None:  # fmt: skip
        """Start ``command`` on ``host``, in the directory of this process."""
        self.rank, self.host = rank, host
        self._early_log = None if shows_output else folder / log_name(rank)
        self._status: int | None = None
        self._failure: Failure | None = None
        self._run_directory: Path | None = None
        self._is_saving = False
        self._killed = 0.0
        script = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.quote(sys.executable)} -P -m {AGENT}"
        with contextlib.ExitStack() as stack:
            output = None if self._early_log is None else stack.enter_context(self._early_log.open("ab"))
            self.process = subprocess.Popen(
                [*connection_command(ssh, host), script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
                start_new_session=True, preexec_fn=end_with_parent(), text=True, encoding="utf-8",
            )  # fmt: skip
        shared = {name: value for name, value in environment.items() if name in PLACE or name.startswith(SHARED)}
        job = {"rank": rank, "command": list(command), "environment": shared, "shares_threads": shares_threads}
        self._send(json.dumps(job))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        if self._status is None and self.process.poll() is not None:
            self._reader.join(timeout=5)
            if self._status is None:
                self._failure = self._failure or self._lost()
                self._status = FAILED
        return self._status

    def _lost(self) -> Failure:
        lines = self.last_lines(1)
        end = f"its command ended with exit status {self.process.returncode}" + (f": {lines[0]}" if lines else "")
        return Failure(
            self.rank, self.host, Kind.error, f"the connection to host {self.host} is lost; {end}", time.time()
        )

    def send_signal(self, number: int) -> None:
        self._send(f"signal {int(number)}")
        if number == signal.SIGKILL:
            self._killed = self._killed or time.monotonic()
            if time.monotonic() - self._killed > LAST_CHANCE_SECONDS:
                self.process.kill()

    def _send(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the connection is gone: poll finds it
            assert self.process.stdin is not None
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        """Take in what the agent reports, a JSON object a line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                report: dict[str, Any] = json.loads(line)
                self._is_saving = bool(report.get("is_saving"))
                if report.get("run_directory"):
                    self._run_directory = Path(report["run_directory"])
                if report.get("failure"):
                    self._failure = Failure.parse(report["failure"])
                if report.get("status") is not None:
                    self._status = int(report["status"])
            except (ValueError, TypeError, AttributeError):  # a greeting of the login shell
                continue

    def is_saving(self) -> bool:
        return self._status is None and self._is_saving

    def failure(self) -> Failure | None:
        return self._failure

    def run_directory(self) -> Path | None:
        return self._run_directory

    def early_log(self) -> Path | None:
        return self._early_log

    def close(self) -> None:
        """End the connection, and with it the rank."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(timeout=LAST_CHANCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
