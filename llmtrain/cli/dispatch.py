"""From a parsed command line to the verb's module: compose the config with Hydra, then run the command."""

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.base.format import visible
from llmtrain.base.invocation import FINISHED, Invocation
from llmtrain.base.leftovers import removed_if_refused
from llmtrain.base.process import Allocator, has_own_tunables, prepare_process
from llmtrain.cli.arguments import CommandLine, UsageError, usage
from llmtrain.cli.hydra_app import run_hydra
from llmtrain.cli.start import OF_A_RUN, requested_allocator
from llmtrain.config.secret_values import hide

if TYPE_CHECKING:
    from llmtrain.run.stored_run import StoredRun
    from llmtrain.sweep.jobs import Job


def dispatch(line: CommandLine) -> int:
    """Compose the verb's config and run the command, or the sweep; returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    stored = None
    if line.verb == "resume" and not line.targets:
        from llmtrain.cli.help import show_resume

        show_resume(usage(line.verb))
        return FINISHED
    if line.verb == "resume":
        from llmtrain.config.compose import register_stored
        from llmtrain.run.stored_run import StoredRun

        stored = StoredRun(line.targets[0], line.step)
        register_stored(stored.composable())
    if line.origin is not None:
        from llmtrain.config.compose import register_stored
        from llmtrain.run.origin import settings_of

        register_stored(settings_of(line.origin))
    from llmtrain.config.texts import as_typed

    overrides = as_typed(line.verb, line.overrides, multirun=line.multirun)
    for note in line.notes:
        print(visible(hide(f"llmtrain: {note}")), file=sys.stderr)
    task = Task(line, stored)
    run_hydra("resume" if line.origin is not None else line.verb, line.flags, overrides, task.run)
    if task.errors:
        raise task.errors[0]
    if task.jobs:
        from llmtrain.sweep.jobs import run_sweep

        return run_sweep(task.jobs, line.sweep_dir, overrides)
    return task.status


class Task:
    """The function that Hydra calls with a composed config: once, or for every job of a sweep."""

    def __init__(self, line: CommandLine, stored: "StoredRun | None") -> None:
        self.line = line
        self.stored = stored  # the run that is resumed
        self.status = FINISHED
        self.jobs: list[Job] = []  # of a sweep that starts once all of them are checked
        self.errors: list[Exception] = []

    def run(self, composed: Any) -> float | None:
        """Handle a config.  Errors are kept: Hydra would print a message of its own."""
        try:
            return self._run(composed)
        except Exception as error:
            self.errors.append(error)
            return None
        except SystemExit as error:
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            self.errors.append(error.__context__)  # of rich: nobody reads the output any more
            return None

    def _run(self, composed: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        from llmtrain.config.compose import resolve

        hydra = HydraConfig.get()
        if self.line.helps:
            self._show_help(composed, hydra)
            return None
        values = resolve(composed, hydra.runtime.choices)
        find_plugins(values)
        if self.line.multirun and self.line.verb == "train":
            return self._run_job(values, hydra)
        self.status = execute(self.line, values, self.stored)
        return None

    def _show_help(self, composed: Any, hydra: Any) -> None:
        from llmtrain.cli.help import show
        from llmtrain.config.compose import shown

        named = [str(override).partition("=")[0] for override in hydra.overrides.task]
        show(self.line.verb, usage(self.line.verb), shown(composed), hydra.runtime.choices, named)

    def _run_job(self, values: dict[str, Any], hydra: Any) -> float | None:
        """Check a job of a sweep; run it here only for a launcher or sweeper that expects its result."""
        from llmtrain.sweep.jobs import Job, run_alone

        job = Job.check(values, [str(override) for override in hydra.overrides.task])
        if hydra.launcher._target_.endswith(".BasicLauncher") and hydra.sweeper._target_.endswith(".BasicSweeper"):
            self.jobs.append(job)
            return None
        return run_alone(job, self.line.sweep_dir, at_once=hydra.launcher.get("n_jobs") or 1)


def execute(line: CommandLine, values: dict[str, Any], stored: "StoredRun | None") -> int:
    """Build the config's dataclass and run the verb's module with it."""
    from llmtrain.config.build import build

    prepare_process(allocator_of(line, values))
    module = importlib.import_module(f"llmtrain.commands.{line.verb}")
    built = build(values, object, plugins=values.get("plugins") or ())
    with notes_to_stderr(), removed_if_refused():
        return module.main(built, Invocation(line.targets, line.words, stored))


def allocator_of(line: CommandLine, values: dict[str, Any]) -> Allocator:
    """Return the allocator of the config.  Raises :class:`UsageError` if the program was started with another one."""
    runtime, device = values.get("runtime"), str(values.get("device"))
    if line.verb in OF_A_RUN and runtime is None:
        return requested_allocator(line.verb, [*map(str, line.targets), f"device={device}"])
    if not isinstance(runtime, dict):  # a verb that does not train
        return Allocator.auto.resolve(device)
    chosen = str(runtime.get("allocator"))
    if chosen != Allocator.system.value:
        return Allocator.named(chosen).resolve(str(runtime.get("device")))
    if has_own_tunables():
        raise UsageError("runtime.allocator=system: comes from a file that is read after malloc is set up; give it on "
                         "the command line")  # fmt: skip
    return Allocator.system


class _Notes(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def notes_to_stderr() -> Iterator[None]:
    """Print what the program logs: text being tokenised, another process that it waits for."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Notes())
    logger = logging.getLogger("llmtrain")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def find_plugins(values: dict[str, Any]) -> None:
    """Let packages that the user named be imported from the working directory, as ``python -m`` would."""
    if values.get("plugins") and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
