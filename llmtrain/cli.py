"""The dispatcher: verb -> conf/<verb>.yaml -> Hydra -> commands/<verb>.py.

Nothing heavy is imported before it is known what is asked for: ``--help`` imports no Hydra, ``--cfg job`` no torch.
"""

import importlib
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import __version__
from llmtrain.commands import FAILED, FINISHED, USAGE_ERROR, Invocation
from llmtrain.format import command as command_line
from llmtrain.format import visible
from llmtrain.suggestions import instead_of_flag, nearest, suggest_key

if TYPE_CHECKING:
    from llmtrain.sweep import Job

VERBS = {
    "train": "compose a run and train it",
    "resume": "continue a run exactly where it stopped",
    "plan": "parameters, FLOPs, memory, time, disk and price of a run, and whether it fits",
    "generate": "text from a run or a checkpoint",
    "chat": "talk to a model in the terminal",
    "predict": "classes for texts, by a model that was trained to tell them apart",
    "export": "a run's model for transformers or PEFT, loaded back before it is there",
    "verify": "check every byte of a run's checkpoints, then prove its resume by replaying steps",
    "report": "table and curves of runs and sweeps",
}
TARGETS = {
    "train": (0, 0), "resume": (1, 1), "plan": (0, 0), "generate": (1, 1), "chat": (1, 1),
    "predict": (1, 1), "export": (1, 1), "verify": (1, 1),
    "report": (1, 1000),
}  # fmt: skip
VALUE_FLAGS = {
    "--cfg": "--cfg", "-c": "--cfg", "--config-dir": "--config-dir", "-cd": "--config-dir",
    "--config-name": "--config-name", "-cn": "--config-name", "--config-path": "--config-path", "-cp": "--config-path",
    "--package": "--package", "-p": "--package", "--info": "--info", "-i": "--info",
}  # fmt: skip
TEXT_KEYS = ("prompt", "text", "system", "template", "loop.sample_prompt", "data.system", "data.template")
FLAGS = ("--help", "-h", "--hydra-help", "--multirun", "-m", "--run", "-r", "--resolve")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

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


class UsageError(ValueError):
    """The command line itself is wrong."""


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


def split(verb: str, arguments: Sequence[str]) -> tuple[list[str], list[Path], list[str]]:
    """Sort arguments that come in any order into Hydra's flags, targets and overrides.

    Hydra 1.3 rejects flags after overrides, so they are put first, each with its value in one word.
    """
    flags: list[str] = []
    targets: list[Path] = []
    overrides: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument.startswith("-") and argument != "-":
            name, equals, value = argument.partition("=")
            if name == "--experimental-rerun":
                raise UsageError(f"{name}: not supported; it would unpickle a file, which runs whatever is in it")
            if name in FLAGS:
                flags.append(argument)
                continue
            if name not in VALUE_FLAGS:
                value = value or " ".join(queue[:1])
                hint = instead_of_flag(verb, name, value, [*FLAGS, *VALUE_FLAGS, "--debug"])
                raise UsageError(f"{name}: no such flag{hint}")
            if not equals:
                needs_value = name not in ("--info", "-i")
                if needs_value and not queue:
                    raise UsageError(f"{name}: needs a value")
                value = queue.pop(0) if needs_value or (queue and queue[0] in INFO) else "all"
            flags.append(f"{VALUE_FLAGS[name]}={value}")
        elif TARGETS[verb][1] and ("=" not in argument or Path(argument).exists()) and argument[0] not in "~+":
            targets.append(Path(argument))
        else:
            overrides.append(argument)
    overrides = [quoted(override) for override in overrides]
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UsageError(f"{override}: neither key=value nor group=option nor a flag")
    return flags, targets, overrides


def quoted(override: str) -> str:
    """A free text is taken as it is: Hydra's grammar would trip over its commas, brackets and apostrophes."""
    key, equals, value = override.partition("=")
    if key not in TEXT_KEYS or not equals or value[:1] in ("'", '"'):
        return override
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"{key}='{escaped}'"


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
    from llmtrain import config

    step: int | None = None
    if verb == "resume":
        targets[0], step, overrides = named_checkpoint(targets[0], overrides)
        config.register_stored(config.load_run(targets[0], step))
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
            from llmtrain.help import show

            named = [str(override).partition("=")[0] for override in hydra_config.overrides.task]
            show(verb, usage(verb), config.shown(composed), hydra_config.runtime.choices, named)
            return None
        values = config.resolve(composed, hydra_config.runtime.choices)
        prepare_plugins(values)
        if multirun:
            from llmtrain.sweep import Job, run_alone

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
        from llmtrain.sweep import run_sweep

        return run_sweep(jobs, sweep_dir, overrides)
    return status


def usage(verb: str) -> str:
    """The form of the verb's command line."""
    target = {0: "", 1: " RUN_DIR"}.get(TARGETS[verb][1], " DIR…")
    groups = " [group=option]" if verb in ("train", "resume", "plan") else ""
    return f"llmtrain {verb}{target}{groups} [key=value]{' [-m]' * (verb == 'train')}"


def execute(verb: str, values: dict[str, Any], invocation: Invocation) -> int:
    """Build the config's dataclass and give it to the verb's module."""
    from llmtrain import config
    from llmtrain.runtime import prepare_process

    prepare_process()
    module = importlib.import_module(f"llmtrain.commands.{verb}")
    built = config.build(values, object, plugins=values.get("plugins") or ())
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


def run_hydra(verb: str, flags: list[str], overrides: list[str], task: Any) -> None:
    """Run Hydra's own command line on ours, put in its order."""
    import hydra

    from llmtrain import config

    with tempfile.TemporaryDirectory() as scratch:  # for what Hydra writes of a sweep, secrets included
        ours = [
            "hydra.run.dir=.", "hydra.output_subdir=null", f"hydra.sweep.dir={scratch}", "hydra.sweep.subdir=.",
            "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.name=llmtrain",
        ]  # fmt: skip
        before, sys.argv = sys.argv, ["llmtrain", *flags, *ours, *overrides]
        try:
            hydra.main(config_path=str(config.conf_dir()), config_name=verb, **config.VERSION_BASE)(task)()
        except SystemExit as error:  # after --help, or argparse has shown what is wrong with a flag's value
            if error.code:
                raise UsageError("see llmtrain --help") from error
        finally:
            sys.argv = before


def take(overrides: list[str], prefix: str) -> tuple[Path | None, list[str]]:
    """The value of the last override that starts with ``prefix``, and the other overrides."""
    values = [override.removeprefix(prefix) for override in overrides if override.startswith(prefix)]
    others = [override for override in overrides if not override.startswith(prefix)]
    return (Path(values[-1]) if values else None), others


def named_checkpoint(target: Path, overrides: list[str]) -> tuple[Path, int | None, list[str]]:
    """The run that ``resume`` is given, the step of its checkpoint if one is named, and the other overrides.

    ``RUN_DIR/checkpoints/step-00000800`` says the same as ``RUN_DIR checkpoint.step=800``.  The step is no part of the
    config that is composed: it says where to begin, once.
    """
    matches = [re.fullmatch(r"\+{0,2}checkpoint\.step=(.*)", override) for override in overrides]
    given = [match[1].strip("'\"") for match in matches if match]
    others = [override for override, match in zip(overrides, matches, strict=True) if not match]
    if given and not re.fullmatch(r"\d+|null", given[-1]):
        raise UsageError(f"checkpoint.step={given[-1]}: must be the step of a checkpoint, as in checkpoint.step=800")
    step = int(given[-1]) if given and given[-1] != "null" else None
    path = target.absolute()
    if path.parent.name == "checkpoints" and (match := re.fullmatch(r"step-(\d+)", path.name)):
        if step not in (None, int(match[1])):
            raise UsageError(f"checkpoint.step={step}: the target is the checkpoint of step {int(match[1])}; name one")
        run_dir = path.parent.parent
        return run_dir if target.is_absolute() else Path(os.path.relpath(run_dir)), int(match[1]), others
    return target, step, others


def prepare_plugins(values: dict[str, Any]) -> None:
    """Let packages that the user named be imported from the working directory, as ``python -m`` would."""
    if values.get("plugins") and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


# --- errors ------------------------------------------------------------------------------------------------------


def explain(error: BaseException, verb: str) -> tuple[str | None, int]:
    """One message for the user and the exit status; no message for what is a bug of ours."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if group == "data" and (Path(option).exists() or "." in option or "/" in option):
            return f"{group}={option}: no such option; to train on a file: data=text data.path={option}", USAGE_ERROR
        return f"{group}={option}: no such option{nearest(option, sorted(error.options))}", USAGE_ERROR
    if isinstance(error, HydraException | OmegaConfBaseException):
        key = find_key(error)
        if key is not None:
            return f"{key}: no such key{suggest_key(key, verb)}", USAGE_ERROR
        message = str(error).strip().splitlines()[0]
        if match := re.match(r"Ambiguous value for argument '([^=']+)=(.*)'$", message):
            key, value = match[1], match[2]
            return (
                f"{key}={value}: several values; if it takes a list: '{key}=[{value}]'; if each is to have a run, a "
                f"sweep: -m; if it is one text with a comma: '{key}=\"{value}\"'"
            ), USAGE_ERROR
        return message, USAGE_ERROR
    if type(error).__name__ in ("TrainingFailed", "DataFailed"):
        return str(error), FAILED
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "a smaller accumulation.micro_batch_size keeps the batch and needs less memory"
        return f"out of memory on the device: {str(error).splitlines()[0]} ({remedy})", FAILED
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}", FAILED
    if isinstance(error, ValueError) and raised_by_us(error):
        return str(error), USAGE_ERROR
    return None, FAILED


def raised_by_us(error: BaseException) -> bool:
    """Whether this package or a plugin raised ``error``: another library's ValueError is no user's mistake."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.split(".")[0] not in ("torch", "numpy", "safetensors", "tiktoken", "rich", "matplotlib", "json")


def find_key(error: BaseException | None) -> str | None:
    """The key that Hydra or OmegaConf did not find."""
    while error is not None:
        if match := re.search(r"Key '([^']+)' is not in struct(?:.*?full_key: (\S+))?", str(error), re.DOTALL):
            return match[2] or match[1]
        if match := re.search(r"Could not override '([^']+)'", str(error)):
            return match[1]
        error = error.__cause__
    return None


# --- shell completion --------------------------------------------------------------------------------------------


def complete(arguments: Sequence[str]) -> int:
    """Hydra's completion, with verbs before it: ``-sc install=bash``, ``-sc query=bash``."""
    line = os.environ.get("COMP_LINE", "")
    request = arguments[-1]
    words = line.split()
    verb = "train"
    if request.startswith("query="):
        typed_verb = len(words) > 2 or (len(words) == 2 and line.endswith(" "))
        if not typed_verb:
            print(" ".join(name for name in VERBS if name.startswith(words[1] if len(words) == 2 else "")))
            return 0
        verb = words[1]
        if verb not in VERBS or (verb in ("generate", "export", "report") and not words[-1]):
            return 0
        os.environ["COMP_LINE"] = line.replace(f" {verb}", "", 1)  # Hydra knows of no verbs
    run_hydra("train" if verb == "resume" else verb, ["-sc"], [request], lambda _: None)
    return 0
