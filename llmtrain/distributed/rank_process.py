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
    def log(self) -> Path | None:
        """The file with the rank's output; None: it is on the terminal."""

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
                 *, shows_output: bool) -> None:  # fmt: skip
        """Start ``command``; ``shows_output``: on the standard output and error of this process, not in a file."""
        self.rank, self.host, self.folder = rank, socket.gethostname(), folder
        self._early_log = None if shows_output else folder / log_name(rank)
        with contextlib.ExitStack() as stack:
            output = None if self._early_log is None else stack.enter_context(self._early_log.open("ab"))
            self.process = subprocess.Popen(
                list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
                stderr=None if output is None else subprocess.STDOUT, start_new_session=True,
                preexec_fn=end_with_parent(),
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

    def log(self) -> Path | None:
        directory = self.run_directory()
        if directory is not None and self._early_log is not None:
            own = directory / "ranks" / log_name(self.rank)
            if own.is_file():
                return own
        return self._early_log


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
