"""The process of a rank, as its supervisor sees it.  Importing this module does not import torch."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.base.threads import default_threads
from llmtrain.distributed.supervision import Failure, failure_name, log_name, read_run_directory, saving_name

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAST_BYTES = 16_384  # of a log, to look for the last lines in


class RankProcess(ABC):
    """A running or ended rank."""

    rank: int
    host: str

    @abstractmethod
    def poll(self) -> int | None:
        """The exit status, minus the number of the signal that ended it; None: it is running."""

    @abstractmethod
    def send_signal(self, number: int) -> None:
        """Send a signal to the rank, if it is running."""

    @abstractmethod
    def is_saving(self) -> bool:
        """True while the rank writes files of a checkpoint."""

    @abstractmethod
    def failure(self) -> Failure | None:
        """The last words of the rank; None: it left none."""

    @abstractmethod
    def run_directory(self) -> Path | None:
        """The run directory, if this rank has told it."""

    @abstractmethod
    def early_log(self) -> Path | None:
        """The file with the rank's output until it writes one of its own; None: the output is on the terminal."""

    @abstractmethod
    def close(self) -> None:
        """End the rank at once, if it is running."""

    def log(self) -> Path | None:
        """The file with the rank's output: in the run directory, else the early one."""
        directory, early = self.run_directory(), self.early_log()
        if directory is not None and early is not None and (own := directory / "ranks" / log_name(self.rank)).is_file():
            return own
        return early

    def last_lines(self, number: int) -> list[str]:
        """The last lines of its output that are not empty."""
        path = self.log()
        try:
            with open(path or os.devnull, "rb") as file:  # noqa: PTH123
                file.seek(max(file.seek(0, os.SEEK_END) - LAST_BYTES, 0))
                lines = file.read().decode("utf-8", errors="replace").splitlines()
        except OSError:
            return []
        return [line for line in lines if line.strip()][-number:]


class LocalRank(RankProcess):
    """A rank on this machine, in a session of its own, which ends with the process that started it."""

    def __init__(self, rank: int, command: Sequence[str], environment: Mapping[str, str], folder: Path,
                 *, output: int | None = None) -> None:  # fmt: skip
        """Start ``command``; its output goes to a file in ``folder``, or with ``output``, 1 or 2, where that of this
        process goes: 1, both as they are; 2, all of it to standard error."""
        self.rank, self.host, self.folder = rank, socket.gethostname(), folder
        self._early_log = folder / log_name(rank) if output is None else None
        streams: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            if self._early_log is not None:
                streams = {"stdout": stack.enter_context(self._early_log.open("ab")), "stderr": subprocess.STDOUT}
            elif output == 2:
                streams = {"stdout": 2}
            self.process = subprocess.Popen(
                list(command), env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True,
                preexec_fn=end_with_parent(), **streams,
            )  # fmt: skip

    def poll(self) -> int | None:
        return self.process.poll()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def is_saving(self) -> bool:
        return self.poll() is None and (self.folder / saving_name(self.rank)).exists()

    def failure(self) -> Failure | None:
        return Failure.read(self.folder / failure_name(self.rank))

    def run_directory(self) -> Path | None:
        return read_run_directory(self.folder)

    def early_log(self) -> Path | None:
        return self._early_log

    def close(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
        self.process.wait()


def end_with_parent() -> Callable[[], None] | None:
    """Return a function for a new process that has the kernel kill it when its parent is gone; None: not on Linux.

    Call it in the thread that starts the process: for the kernel that thread is the parent.
    """
    if sys.platform != "linux":
        return None  # the heartbeat of a rank looks at the number of its parent
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def set_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)

    return set_signal


def share_threads(environment: dict[str, str], processes: int) -> None:
    """Give each of ``processes`` its share of the cores of this machine, unless the user has set the number."""
    if not environment.get("OMP_NUM_THREADS"):
        environment["OMP_NUM_THREADS"] = str(max(default_threads() // processes, 1))
