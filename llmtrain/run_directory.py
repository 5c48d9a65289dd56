"""The directory of one run: made once, locked while a process works in it."""

import datetime
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.storage import CONFIG, find_checkpoints

ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"  # no characters that are mistaken for one another


class RunDirectory:
    """Names of the files of a run.  ``metrics.jsonl`` and its kin belong to their writers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, output_dir: Path, name: str) -> "RunDirectory":
        """Make ``output_dir/<date>/<name>-<random>``; two processes never get the same one."""
        day = output_dir / datetime.date.today().isoformat()
        day.mkdir(parents=True, exist_ok=True)
        while True:
            path = day / f"{slug(name)}-{''.join(secrets.choice(ALPHABET) for _ in range(4))}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return cls(path)

    @classmethod
    def create_at(cls, path: Path) -> "RunDirectory":
        """Make exactly ``path``.  Raises ValueError if it is there already."""
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ValueError(
                f"run_dir={path}: exists already; name another, or go on with: llmtrain resume {path}"
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """The run at ``path``.  Raises ValueError if it is none."""
        run = cls(path)
        if not path.is_dir():
            raise ValueError(f"{path}: no such run directory")
        if not run.config.is_file():
            raise ValueError(f"{path}: not a run directory (it has no {CONFIG})")
        return run

    def find_checkpoints(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return find_checkpoints(self.path)

    def is_finished(self) -> bool:
        """Whether the run came to its end, as its summary has it."""
        try:
            return json.loads(self.summary.read_text(encoding="utf-8"))["exit_reason"] == "finished"
        except (OSError, ValueError, KeyError, TypeError):
            return False  # no summary, or one that a kill left behind: the run has to go on

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run.  Raises ValueError if another process does; the lock dies with its process."""
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{self.path}: another process (pid {file.read().strip() or 'unknown'}) is working in this run; "
                    "wait for it or stop it first"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def slug(text: str) -> str:
    """``text`` as a file name that needs no quoting in a shell."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("._") or "run"
