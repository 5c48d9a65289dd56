"""Processes that tests have started, seen from outside."""

from pathlib import Path


def is_running(pid: int) -> bool:
    """Return whether there is a process of that number that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
