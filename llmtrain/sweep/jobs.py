"""The jobs of a sweep, checked together and run one by one, each in a process of its own.

The directory of a sweep is named by its overrides, that of a job by the overrides that vary and a hash of its config.
So the same command finds its jobs again: a finished job is skipped, a started one resumed.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from llmtrain.base.files import write_atomically
from llmtrain.base.format import visible, width
from llmtrain.base.invocation import FAILED, FINISHED, INTERRUPTED
from llmtrain.base.outputs import check_output_directory
from llmtrain.base.process import cache_folder
from llmtrain.base.run_files import CONFIG
from llmtrain.base.run_records import read_summary
from llmtrain.base.threads import default_threads
from llmtrain.config import stored_config
from llmtrain.config.older_versions import with_defaults
from llmtrain.config.overrides import key_of
from llmtrain.config.secret_values import redact, redact_arguments
from llmtrain.config.stored_config import NOT_RUN_KEYS
from llmtrain.report.table import sweep_table
from llmtrain.run.directory import RunDirectory, slug
from llmtrain.run.origin import run_at
from llmtrain.run.run import Run

# Signals that stop a sweep: its job saves and exits 75.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    overrides: list[str]
    run: Run

    @classmethod
    def check(cls, values: dict[str, Any], overrides: list[str]) -> "Job":
        """Build the job's config.  Raises ValueError naming the job."""
        if values.get("run_dir") is not None:
            raise ValueError("run_dir: a sweep names its directories itself; hydra.sweep.dir=DIR chooses their folder")
        try:
            return cls(overrides, Run.from_config(values))
        except ValueError as error:
            raise ValueError(f"{error} (in the job {' '.join(redact_arguments(overrides))})") from error

    @property
    def digest(self) -> str:
        """Return a hash of the training, whatever its directory."""
        values = {k: v for k, v in stored_config.to_plain(self.run).items() if k not in NOT_RUN_KEYS}
        return short_hash(yaml.safe_dump(values))

    def directory(self, sweep: Path, varied: Sequence[str]) -> RunDirectory:
        """Return the job's directory, named by the overrides that vary and the digest.

        The digest of an older version is another, as it had fewer keys: its directory is found by its config.
        """
        label = slug(",".join(redact_arguments(varied)).replace("=", "_"))[:80]
        named = sweep / f"{label}-{self.digest}"
        if not named.exists() and sweep.is_dir():
            begun = sorted(path for path in sweep.iterdir() if path.name.startswith(f"{label}-"))
            return RunDirectory(next(filter(self.is_in, begun), named))
        return RunDirectory(named)

    def is_in(self, path: Path) -> bool:
        """True if the stored config at ``path`` is the job's, as far as the version that wrote it had the keys.

        A key that it did not have must have its default here.
        """
        try:
            stored = stored_config.load(path / CONFIG)
        except ValueError:
            return False
        ours = stored_config.flatten(redact(stored_config.to_plain(self.run)))
        theirs = stored_config.flatten(stored)
        completed = stored_config.flatten(with_defaults(stored))
        return all(
            value == (theirs[key] if key in theirs else completed.get(key))
            for key, value in ours.items()
            if key.partition(".")[0] not in NOT_RUN_KEYS
        )


def run_sweep(jobs: Sequence[Job], sweep_dir: Path | None, overrides: Sequence[str]) -> int:
    """Run the ``jobs`` that are not finished; rank all at the end.  A failed job does not stop the others.

    Returns 0 if all finished, 1 if any failed, 75 if a signal stopped the sweep.
    """
    first = jobs[0].run
    sweep = sweep_dir or Path(first.output_dir) / "sweeps" / f"{slug(first.name)}-{short_hash(*sorted(overrides))}"
    check_output_directory("output_dir" if sweep_dir is None else "hydra.sweep.dir", str(sweep))
    console = Console(highlight=False)
    if len(jobs) == 1:
        console.print(Text("nothing varies, so there is one job; to vary a key: optimizer.lr=1e-3,1e-4"))
    statuses = []
    directories = [job.directory(sweep, varied_overrides(job, jobs)) for job in jobs]
    for number, (job, directory) in enumerate(zip(jobs, directories, strict=True), start=1):
        label = " ".join(redact_arguments(varied_overrides(job, jobs)))
        console.rule(Text(visible(f"job {number} of {len(jobs)}: {label}")), align="left")
        if directory.is_finished():
            console.print(Text(visible(f"finished already: {directory.path}")))
            statuses.append(FINISHED)
            continue
        statuses.append(run_process(job, directory))
        if statuses[-1] == INTERRUPTED or statuses[-1] - 128 in FORWARDED:
            console.print(Text("stopped; the same command continues from here"))
            return INTERRUPTED
        if statuses[-1]:
            if not directory.summary.exists():  # it ended before training
                write_atomically(directory.summary, json.dumps({"exit_reason": "failed", "step": 0}) + "\n")
            console.print(Text(f"this job failed with exit status {statuses[-1]}; the sweep continues", style="red"))
    console.rule("sweep", align="left")
    swept = {directory.path: settings_of(varied_overrides(job, jobs))
             for job, directory in zip(jobs, directories, strict=True)}  # fmt: skip
    if not sys.stdout.isatty():
        console.width = width()
    console.print(sweep_table(sweep, swept))
    for line in afterwards(sweep, jobs, directories):
        console.print(Text(visible(line)), soft_wrap=True)
    return FAILED if any(statuses) else FINISHED


def settings_of(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values that a job was given, by their keys, without secrets."""
    return {key_of(override): override.partition("=")[2] for override in redact_arguments(overrides)}


def afterwards(sweep: Path, jobs: Sequence[Job], directories: Sequence[RunDirectory]) -> Iterator[str]:
    """Yield the commands that follow a sweep: one that trains its best job longer, and one that draws its curves."""
    best = run_at(sweep)
    job = next((job for job, directory in zip(jobs, directories, strict=True) if directory.path == best), None)
    if job is not None:
        longer = job.run.loop.times(2)
        yield f"the best job for longer: llmtrain train --from {shlex.quote(str(best))} {longer}"
    yield f"curves: llmtrain report {shlex.quote(str(sweep))}"


def run_alone(job: Job, sweep_dir: Path | None, *, at_once: int = 1) -> float | None:
    """Run a job for a launcher or sweeper of Hydra's; returns its best validation loss, which they minimise.

    ``at_once``: jobs that run at the same time, which share the cores; as joblib counts, -1: one for each processor.
    """
    sweep = sweep_dir or Path(job.run.output_dir) / "sweeps" / slug(job.run.name)
    directory = job.directory(sweep, job.overrides)
    if not directory.is_finished() and (status := run_process(job, directory, threads_of_each(at_once))):
        raise RuntimeError(f"{directory.path}: the job ended with exit status {status}")
    return read_summary(directory.summary).get("best_val_loss")


def threads_of_each(at_once: int) -> int | None:
    """The number of threads of each of several jobs at once; None: as usual."""
    jobs = at_once if at_once > 0 else max((os.cpu_count() or 1) + 1 + at_once, 1)
    return None if jobs == 1 else max(default_threads() // jobs, 1)


def run_process(job: Job, directory: RunDirectory, threads: int | None = None) -> int:
    """Run or resume a job in a process of its own; returns its exit status.

    ``threads``: of a job that names no number itself and begins now.
    A signal to this process is forwarded to the job, which saves and exits 75.
    """
    if not directory.config.exists():
        directory.path.mkdir(parents=True, exist_ok=True)
        write_atomically(directory.overrides, json.dumps(redact_arguments(job.overrides)) + "\n")
        write_atomically(directory.config, stored_config.dump(job.run))
    plugins = [f"plugins=[{','.join(job.run.plugins)}]"] if job.run.plugins else []
    place = os.path.join(".", directory.path)  # noqa: PTH118 (a Path has no "./", and a name may begin with a dash)
    command = [
        sys.executable,
        "-P",
        "-m",
        "llmtrain",
        "resume",
        place,
        *plugins,
        *cache_of(job.run),
    ]  # -P: not a folder named llmtrain
    shared = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, process_group=0, env=os.environ | shared
    )  # out of the terminal's group: a signal reaches it once, through us

    def forward(number: int, _: Any) -> None:
        process.send_signal(number)

    forwarded = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in forwarded}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def cache_of(run: Run) -> list[str]:
    """The override that names the cache of a job, where it is not the usual one: a stored config decides no place."""
    cache_dir = getattr(run.data, "cache_dir", None)
    if cache_dir is None or Path(cache_dir).expanduser() == cache_folder():
        return []
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", cache_dir)
    return [f"data.cache_dir='{escaped}'"]


def varied_overrides(job: Job, jobs: Sequence[Job]) -> list[str]:
    """Return the overrides of ``job`` that not all ``jobs`` share."""
    common = set.intersection(*(set(other.overrides) for other in jobs))
    return [override for override in job.overrides if override not in common] or job.overrides


def short_hash(*texts: str) -> str:
    """Hash ``texts`` to eight hexadecimal digits."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
