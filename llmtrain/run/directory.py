"""The directory of one run: made once, locked while a process works in it."""

import datetime
import json
import logging
import os
import re
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.base.files import exists, write_atomically
from llmtrain.base.format import command
from llmtrain.base.locks import lock
from llmtrain.base.outputs import check_output_directory
from llmtrain.base.run_files import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    LOCK,
    LOG,
    MANIFEST,
    METRICS,
    OVERRIDES,
    PROFILE,
    SAMPLES,
    SUMMARY,
    TENSORBOARD,
    TOKENIZER,
)
from llmtrain.base.run_records import read_environment, read_overrides, read_summary
from llmtrain.base.stored_files import StoredFileError, open_regular
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
        cls.check_free(path)
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another process was faster
            raise ValueError(f"run_dir={path}: exists already; name another") from None
        return cls(path)

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raise ValueError if there is something at ``path`` already, or nothing can be made there."""
        if exists(path / CONFIG):
            there = command("resume", shlex.quote(str(path)))
            raise ValueError(f"run_dir={path}: exists already; name another, or continue the run: {there}")
        if exists(path):
            raise ValueError(f"run_dir={path}: exists already; name another")
        check_output_directory("run_dir", str(path))

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
        try:
            return read_environment(self.environment)
        except StoredFileError as error:
            raise StoredFileError(f"{error}; or remove it to continue") from error

    def recorded_threads(self, processes: int = 1) -> int | None:
        """The number of CPU threads that the run was last trained with; None if it is not on record.

        None too where it had another number of ``processes``.
        """
        environment = self.read_environment() or {}
        entries = [environment, *(entry for entry in environment.get("resumes", []) if isinstance(entry, dict))]
        if entries[-1].get("processes", 1) != processes:
            return None
        devices = [str(entry["device"]) for entry in entries if "device" in entry]
        found = re.search(r", (\d+) threads?$", devices[-1]) if devices else None
        return int(found[1]) if found and 0 < int(found[1]) <= len(allowed_cpus()) else None

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Replace ``environment.json``: the facts of the start, ``resumes`` (one entry each) and ``parent``."""
        write_atomically(self.environment, json.dumps(environment, indent=1) + "\n")

    def read_overrides(self) -> list[str]:
        """The overrides of a sweep's job, without those of Hydra's own settings; empty for any other run."""
        return [override for override in read_overrides(self.overrides) if not override.startswith("hydra")]

    def is_finished(self) -> bool:
        """True if the run reached its end, by its summary."""
        return self.finished_step() is not None

    def finished_step(self) -> int | None:
        """The step at which the run reached its end, by its summary; None if it has not."""
        try:
            summary = read_summary(self.summary)
        except StoredFileError:
            return None  # one cut short or edited: the run has to continue, and writes another
        return summary.get("step") if summary.get("exit_reason") == "finished" else None

    def check_places(self) -> None:
        """Raise ValueError for folders that are links, or none, and for logs that are no files: a run writes there."""
        for folder in (self.path / name for name in (CHECKPOINTS, PROFILE, TENSORBOARD, TOKENIZER)):
            if folder.is_symlink():
                raise ValueError(
                    f"{folder}: a link, to {folder.readlink()}; the run would write and remove files there; put "
                    "the folder itself in its place, or continue in another directory: run_dir=DIR"
                )
            if os.path.lexists(folder) and not folder.is_dir():
                raise ValueError(f"{folder}: not a directory; remove it, or restore the folder")
        for file in (self.metrics, self.samples, self.path / LOG):
            if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
                kind = "a link" if file.is_symlink() else "no regular file"
                raise ValueError(f"{file}: {kind}, and the run would write to it; remove it, or restore the file")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run.  Raises ValueError if another process does; the lock dies with its process."""
        descriptor = self._locked()
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def _locked(self) -> int:
        """Open the lock and take it, where the file system has locks.

        A lock with another name too, as in a copy of hard links, is made anew.
        """
        path = self.path / LOCK
        while True:
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            try:
                if not lock(descriptor, wait=False):
                    self._check_alone(descriptor)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise ValueError(
                    f"{self.path}: another process (pid {holder or 'unknown'}) is working in this run; "
                    "wait for it or stop it first"
                ) from None
            except ValueError:
                os.close(descriptor)
                raise
            links = os.fstat(descriptor).st_nlink
            if links == 1:
                return descriptor
            os.close(descriptor)  # 0: another process has replaced it
            if links > 1:
                path.unlink(missing_ok=True)

    def _check_alone(self, descriptor: int) -> None:
        """Raise ValueError if the process whose number is in the file is still there; for systems without locks."""
        holder = _holder(descriptor)
        if holder and int(holder) != os.getpid() and Path(f"/proc/{holder}").exists():
            raise ValueError(
                f"{self.path}: another process (pid {holder}) seems to work in this run, and this file system has no "
                "locks to be sure by; wait for it or stop it first, or, if it is something else, remove "
                f"{self.path / LOCK}"
            )
        log.warning("%s: this file system has no locks; make sure that no other process works in this run", self.path)


def _holder(descriptor: int) -> str:
    """The number of the process that wrote the lock file; "" if it holds none."""
    pid = os.pread(descriptor, 20, 0).decode("ascii", errors="replace").strip()
    return pid if pid.isdecimal() else ""


def slug(text: str) -> str:
    """``text`` as a file name that needs no quoting in a shell."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("._") or "run"
