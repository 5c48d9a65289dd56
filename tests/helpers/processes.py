"""Processes that tests have started: seen from outside, and their end."""

import ctypes
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_running(pid: int) -> bool:
    """Return whether there is a process of that number that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
