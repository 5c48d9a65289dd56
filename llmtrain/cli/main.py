"""The dispatcher: verb -> conf/<verb>.yaml -> Hydra -> commands/<verb>.py.

Nothing heavy is imported before it is known what is asked for: ``--help`` imports no Hydra, ``--cfg job`` no torch.
"""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import __version__
from llmtrain.base.format import command as command_line
from llmtrain.base.format import visible
from llmtrain.base.invocation import FAILED, FINISHED, Invocation
from llmtrain.cli.arguments import TARGETS, VERBS, UsageError, named_checkpoint, split, take
from llmtrain.cli.completion import complete
from llmtrain.cli.errors import explain
from llmtrain.cli.hydra_app import run_hydra
from llmtrain.cli.suggestions import nearest

if TYPE_CHECKING:
    from llmtrain.sweep.jobs import Job


HELP = f"""llmtrain {__version__}: config-driven training of language models

  llmtrain VERB [TARGET] [group=option] [key=value] [flags]

{{verbs}}

Examples
  llmtrain train model=gpt124m schedule=warmup_cosine
  llmtrain train -m optimizer.lr=1e-4,3e-4,1e-3
  llmtrain resume runs/2026-11-21/gpt124m-k3v9
  llmtrain verify runs/2026-11-21/gpt124m-k3v9
  llmtrain generate runs/2026-11-21/gpt124m-k3v9 prompt="Once upon a time"
  llmtrain export runs/2026-11-21/gpt124m-k3v9 to=my-model

Flags
  -m, --multirun     a sweep: every combination of comma-separated values, each in a process of its own
  --cfg job          show the composed config and do nothing
  --info             show where the config comes from
  --config-dir DIR   a folder of your own with config groups, as in DIR/model/mine.yaml
  --debug            show the traceback of an error
  llmtrain VERB --help says what a verb takes: groups and their options, every key, its value and what it is.

Exit status: 0 finished, 1 failed, 2 the command or its config is wrong, 75 stopped after saving (resume goes on).

Shell completion: eval "$(llmtrain -sc install=bash)"   (or zsh, fish)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 1 failed, 2 usage, 75 stopped by a signal after saving."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-sc", "--shell_completion", "--shell-completion") for argument in arguments):
        return complete(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())))
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"llmtrain {__version__}")
        return FINISHED
    debug = "--debug" in arguments
    command = ["llmtrain", *arguments]
    try:
        verb, *rest = [argument for argument in arguments if argument != "--debug"] or [""]
        if verb not in VERBS:
            raise UsageError(f"{verb}: no such verb{nearest(verb, list(VERBS))}")
        flags, targets, overrides = split(verb, rest)
        return dispatch(verb, flags, targets, overrides, command)
    except KeyboardInterrupt:
        print("llmtrain: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough, as in: llmtrain train --cfg job | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if debug:
            complain(traceback.format_exc())
        message, status = explain(error, next((verb for verb in arguments if verb in VERBS), "train"))
        if status == FAILED and message is None and not debug:
            complain(traceback.format_exc() + "llmtrain: this is a bug; the traceback above says where")
        elif message is not None:
            notes = getattr(error, "__notes__", [])
            complain("; ".join([f"llmtrain: {message}", *notes]))
        return status


def complain(text: str) -> None:
    """To stderr; control characters, as a file name or a run from elsewhere may have, are shown and not obeyed."""
    print(visible(text), file=sys.stderr)


# --- the command line --------------------------------------------------------------------------------------------


def dispatch(verb: str, flags: list[str], targets: list[Path], overrides: list[str], command: list[str]) -> int:
    """Compose the verb's config and hand it to the verb's module."""
    only_shows = any(flag.startswith(("--cfg", "--info", "--help", "-h", "--hydra-help")) for flag in flags)
    if verb == "resume" and any(flag in ("-m", "--multirun") for flag in flags):
        raise UsageError("resume continues one run; a sweep goes on when its own command is given again")
    helps = "--help" in flags or "-h" in flags
    if helps:
        flags = [flag for flag in flags if not flag.startswith(("--help", "-h", "-m", "--multirun", "--cfg", "--info"))]
    least, most = TARGETS[verb]
    if (len(targets) < least and not (only_shows and verb != "resume")) or len(targets) > most:
        if only_shows and not targets:
            raise UsageError("resume shows the stored config of a run; name it: llmtrain resume RUN_DIR --help")
        wanted = {0: "no directory", 1: "one directory: a run's"}.get(most, "directories of runs or sweeps")
        example = command_line(verb, "RUN_DIR") if most else f"llmtrain {verb}"
        raise UsageError(f"{verb} takes {wanted}, as in: {example}")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    from llmtrain.config.compose import register_stored, resolve, shown

    step: int | None = None
    if verb == "resume":
        targets[0], step, overrides = named_checkpoint(targets[0], overrides)
        from llmtrain.run.resume import load_run

        register_stored(load_run(targets[0], step))
    multirun = verb == "train" and any(flag in ("-m", "--multirun") for flag in flags)
    sweep_dir, overrides = take(overrides, "hydra.sweep.dir=")
    status = FINISHED
    jobs: list[Job] = []
    errors: list[Exception] = []

    def task(composed: Any) -> float | None:
        """Called by Hydra: once, or for every job of a sweep.  Hydra would print an error of its own about ours."""
        try:
            return job_or_run(composed)
        except Exception as error:
            errors.append(error)
            return None

    def job_or_run(composed: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        nonlocal status
        hydra_config = HydraConfig.get()
        if helps:
            from llmtrain.cli.help import show

            named = [str(override).partition("=")[0] for override in hydra_config.overrides.task]
            show(verb, usage(verb), shown(composed), hydra_config.runtime.choices, named)
            return None
        values = resolve(composed, hydra_config.runtime.choices)
        prepare_plugins(values)
        if multirun:
            from llmtrain.sweep.jobs import Job, run_alone

            job = Job.check(values, [str(override) for override in hydra_config.overrides.task])
            if hydra_config.launcher._target_.endswith(".BasicLauncher") and hydra_config.sweeper._target_.endswith(
                ".BasicSweeper"
            ):
                jobs.append(job)  # all are checked before the first one runs
                return None
            return run_alone(job, sweep_dir)  # another launcher wants each job to run when it is called
        status = execute(verb, values, Invocation(targets, command, step))
        return None

    run_hydra(verb, flags, overrides, task)
    if errors:
        raise errors[0]
    if jobs:
        from llmtrain.sweep.jobs import run_sweep

        return run_sweep(jobs, sweep_dir, overrides)
    return status


def usage(verb: str) -> str:
    """The form of the verb's command line."""
    target = {0: "", 1: " RUN_DIR"}.get(TARGETS[verb][1], " DIR…")
    groups = " [group=option]" if verb in ("train", "resume", "plan") else ""
    return f"llmtrain {verb}{target}{groups} [key=value]{' [-m]' * (verb == 'train')}"


def execute(verb: str, values: dict[str, Any], invocation: Invocation) -> int:
    """Build the config's dataclass and give it to the verb's module."""
    from llmtrain.base.process import prepare_process
    from llmtrain.config.build import build

    prepare_process()
    module = importlib.import_module(f"llmtrain.commands.{verb}")
    built = build(values, object, plugins=values.get("plugins") or ())
    with notes_to_stderr():
        return module.main(built, invocation)


class _Notes(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def notes_to_stderr() -> Iterator[None]:
    """Show what the program notes on the way: text being tokenised, another process waited for."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Notes())
    logger = logging.getLogger("llmtrain")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def prepare_plugins(values: dict[str, Any]) -> None:
    """Let packages that the user named be imported from the working directory, as ``python -m`` would."""
    if values.get("plugins") and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


# --- errors ------------------------------------------------------------------------------------------------------


# --- shell completion --------------------------------------------------------------------------------------------
