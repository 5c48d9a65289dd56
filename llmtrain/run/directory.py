"""The directory of one run: made once, locked while a process works in it."""

import datetime
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmtrain.base.files import write_atomically
from llmtrain.base.locks import lock
from llmtrain.base.run_files import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    LOCK,
    MANIFEST,
    METRICS,
    OVERRIDES,
    SAMPLES,
    SUMMARY,
)
from llmtrain.base.threads import allowed_cpus
from llmtrain.checkpoint.directory import find_checkpoints, newest_run_in, step_of

log = logging.getLogger(__name__)
ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"  # without characters that are easily confused


class RunDirectory:
    """Names of the files of a run.  ``metrics.jsonl`` and its kin belong to their writers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.environment = path / ENVIRONMENT
        self.overrides = path / OVERRIDES  # of a sweep's job: the overrides of its command line
        self.metrics = path / METRICS
        self.samples = path / SAMPLES
        self.summary = path / SUMMARY
        self.checkpoints = path / CHECKPOINTS

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
                f"run_dir={path}: exists already; name another"
                + (f", or continue the run: llmtrain resume {path}" if path.is_dir() else "")
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """The run at ``path``.  Raises ValueError if it is none."""
        run = cls(path)
        if not path.is_dir():
            raise ValueError(f"{path}: no such run directory")
        if (path / MANIFEST).is_file():
            raise ValueError(
                f"{path}: a checkpoint without its run; name the run, RUN_DIR/checkpoints/{path.name} in it, or start "
                f"a new run from its weights: weights=checkpoint weights.path={path}"
            )
        if not run.config.is_file():
            raise ValueError(f"{path}: not a run directory (it has no {CONFIG}){newest_run_in(path)}")
        return run

    def find_checkpoints(self) -> list[Path]:
        """The checkpoints of the run, oldest first."""
        return find_checkpoints(self.path)

    def is_older(self, step: int | None) -> bool:
        """True if there are newer checkpoints than that of ``step``."""
        return step is not None and any(step_of(path) > step for path in self.find_checkpoints())

    def config_at(self, step: int | None) -> Path:
        """The path of the config to continue with from the checkpoint of ``step`` (None: the newest).

        For the newest it is the run's; for an older one the checkpoint's, since later changes belong to the steps after
        it.
        """
        older = [path for path in self.find_checkpoints() if step_of(path) == step] if self.is_older(step) else []
        return older[0] / CONFIG if older else self.config

    def read_environment(self) -> dict[str, Any] | None:
        """``environment.json``; None if there is none.  Raises ValueError naming it if it cannot be read."""
        if not self.environment.exists():
            return None
        try:
            environment = json.loads(self.environment.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.environment}: not JSON ({error}); restore it, or remove it to continue") from error
        if not isinstance(environment, dict) or not isinstance(environment.get("resumes", []), list):
            raise ValueError(f"{self.environment}: not a run's environment; restore it, or remove it to continue")
        return environment

    def recorded_threads(self) -> int | None:
        """The number of CPU threads that the run was last trained with; None if it is not on record."""
        environment = self.read_environment() or {}
        entries = [environment, *(entry for entry in environment.get("resumes", []) if isinstance(entry, dict))]
        devices = [str(entry["device"]) for entry in entries if "device" in entry]
        found = re.search(r", (\d+) threads?$", devices[-1]) if devices else None
        return int(found[1]) if found and 0 < int(found[1]) <= len(allowed_cpus()) else None

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Replace ``environment.json``: the facts of the start, ``resumes`` (one entry each) and ``parent``."""
        write_atomically(self.environment, json.dumps(environment, indent=1) + "\n")

    def read_overrides(self) -> list[str]:
        """The overrides of a sweep's job, without those of Hydra's own settings; empty for any other run."""
        if not self.overrides.exists():
            return []
        overrides = json.loads(self.overrides.read_text(encoding="utf-8"))
        return [override for override in overrides if not override.startswith("hydra")]

    def is_finished(self) -> bool:
        """True if the run reached its end, by its summary."""
        try:
            return json.loads(self.summary.read_text(encoding="utf-8"))["exit_reason"] == "finished"
        except (OSError, ValueError, KeyError, TypeError):
            return False  # no summary, or one cut short by a kill: the run has to continue

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run.  Raises ValueError if another process does; the lock dies with its process."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW  # a copied run may hold a link to any file
        with os.fdopen(os.open(self.path / LOCK, flags, 0o666), "a+") as file:
            try:
                is_locked = lock(file.fileno(), wait=False)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{self.path}: another process (pid {file.read().strip() or 'unknown'}) is working in this run; "
                    "wait for it or stop it first"
                ) from None
            if not is_locked:
                self._check_alone(file)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                if not is_locked:
                    file.truncate(0)

    def _check_alone(self, file: IO[str]) -> None:
        """Where there are no locks: raise ValueError if the process whose number the file holds is still there."""
        file.seek(0)
        holder = file.read().strip()
        if holder.isdecimal() and int(holder) != os.getpid() and Path(f"/proc/{holder}").exists():
            raise ValueError(
                f"{self.path}: another process (pid {holder}) seems to work in this run, and this file system has no "
                f"locks to be sure by; wait for it or stop it first, or, if it is something else, remove {file.name}"
            )
        log.warning("%s: this file system has no locks; make sure that no other process works in this run", self.path)


def slug(text: str) -> str:
    """``text`` as a file name that needs no quoting in a shell."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("._") or "run"
