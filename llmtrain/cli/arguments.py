"""The parsed command line: verb, flags, targets and overrides."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.base.format import command
from llmtrain.base.run_files import CHECKPOINTS
from llmtrain.cli.start import split_verb
from llmtrain.cli.suggestions import flag_hint, names_hint

VERBS = {
    "train": "train a model",
    "resume": "continue a run exactly where it stopped",
    "plan": "estimate memory, time, disk and price of a run, and check that it fits",
    "generate": "generate text with a run or a checkpoint",
    "chat": "talk to a model in the terminal",
    "predict": "classify texts with a run that was trained to",
    "export": "write the model for transformers or PEFT, and check it by loading it back",
    "verify": "check every byte of a run's checkpoints, then prove its resume by replaying steps",
    "report": "compare runs and sweeps in a table and as curves",
}

TARGETS = {  # least and most directories
    "train": (0, 0), "resume": (1, 1), "plan": (0, 0), "generate": (1, 1), "chat": (1, 1),
    "predict": (1, 1), "export": (1, 1), "verify": (1, 1),
    "report": (1, 1000),
}  # fmt: skip

FLAGS = ("--help", "-h", "--hydra-help", "--multirun", "-m", "--run", "-r", "--resolve")

VALUE_FLAGS = {
    "--cfg": "--cfg", "-c": "--cfg", "--config-dir": "--config-dir", "-cd": "--config-dir",
    "--config-name": "--config-name", "-cn": "--config-name", "--config-path": "--config-path", "-cp": "--config-path",
    "--package": "--package", "-p": "--package", "--info": "--info", "-i": "--info",
}  # fmt: skip

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # values of --info

TEXT_OF = {"generate": "prompt", "predict": "text"}  # verbs that take a text, and its key

TEXT_KEYS = ("prompt", "text", "system", "template", "loop.sample_prompt", "data.system", "data.template")


OF_A_MODEL = ("resume", "generate", "chat", "predict", "export", "verify")  # earlier versions: base= for weights.path=


class UsageError(ValueError):
    """A mistake in the command line itself."""


@dataclass(frozen=True)
class CommandLine:
    """One command line, parsed and checked."""

    verb: str
    flags: list[str]  # Hydra's, each with its value in one word
    targets: list[Path]
    overrides: list[str]
    words: list[str]  # all of it as typed, for the record
    helps: bool  # --help was given
    only_shows: bool  # nothing is done under a flag such as --help or --cfg
    multirun: bool
    step: int | None = None  # resume: of the checkpoint that is named
    sweep_dir: Path | None = None


def parse(arguments: Sequence[str]) -> CommandLine:
    """Parse and check everything after ``llmtrain``.  Raises :class:`UsageError`."""
    verb, rest = split_verb(arguments)
    if verb not in VERBS:
        raise UsageError(f"{verb}: no such verb{names_hint(verb, list(VERBS))}")
    flags, targets, overrides = split(verb, rest)
    if any(flag.startswith("--package=") for flag in flags) and not any(flag.startswith("--cfg=") for flag in flags):
        raise UsageError(f"--package: only with --cfg job, as in: llmtrain {verb} --cfg job --package optimizer")
    multirun = "-m" in flags or "--multirun" in flags
    if verb == "resume" and multirun:
        raise UsageError("resume continues one run; a sweep continues when its own command is given again")
    only_shows = any(flag.startswith(("--cfg", "--info", "--help", "-h", "--hydra-help")) for flag in flags)
    helps = "--help" in flags or "-h" in flags
    if helps:
        flags = [flag for flag in flags if not flag.startswith(("--help", "-h", "-m", "--multirun", "--cfg", "--info"))]
    check_targets(verb, targets, only_shows=only_shows, helps=helps)
    step = None
    if verb == "resume" and targets:
        targets[0], step, overrides = named_checkpoint(targets[0], overrides)
    if verb in OF_A_MODEL:
        overrides = [re.sub(r"^\+{0,2}base=", "weights.path=", override) for override in overrides]
    refuse_step(verb, overrides)
    sweep_dir, overrides = take(overrides, "hydra.sweep.dir=")
    words = ["llmtrain", *arguments]
    return CommandLine(
        verb,
        flags,
        targets,
        overrides,
        words,
        helps,
        only_shows,
        multirun and not helps and verb == "train",
        step,
        sweep_dir,
    )


def check_targets(verb: str, targets: Sequence[Path], *, only_shows: bool, helps: bool) -> None:
    """Raise :class:`UsageError` unless the verb takes that many directories.

    To show its config a verb needs none, except ``resume``, whose config is the run's.
    """
    least, most = TARGETS[verb]
    if least <= len(targets) <= most or (only_shows and (helps or verb != "resume") and len(targets) <= most):
        return
    if only_shows and not targets:
        raise UsageError("resume shows the stored config of a run; name it: llmtrain resume RUN_DIR --cfg job")
    if len(targets) > most:
        raise UsageError(too_many(verb, targets))
    wanted = {0: "no directory", 1: "one directory: a run's"}.get(most, "directories of runs or sweeps")
    example = command(verb, "RUN_DIR") if most else f"llmtrain {verb}"
    raise UsageError(f"{verb} takes {wanted}, as in: {example}")


def too_many(verb: str, targets: Sequence[Path]) -> str:
    """Name the words beyond the one directory of the verb, and the key that a text belongs to."""
    words = [str(target) for target in targets if not target.is_dir()]
    text = " ".join(words if 0 < len(words) < len(targets) else map(str, targets[1:]))
    if verb not in TEXT_OF:
        return f"{text}: neither key=value nor a directory that this verb takes; as in: {command(verb, 'RUN_DIR')}"
    key = TEXT_OF[verb]
    written = shlex.quote(text) if re.search(r'["$`!\\]', text) else f'"{text}"'
    return f"{text}: not key=value; for a {key}: {key}={written}, as in: llmtrain {verb} RUN_DIR {key}={written}"


def split(verb: str, arguments: Sequence[str]) -> tuple[list[str], list[Path], list[str]]:
    """Sort arguments that come in any order into Hydra's flags, targets and overrides.

    Hydra 1.3 rejects flags after overrides, so they come first, each with its value in one word.
    """
    flags: list[str] = []
    targets: list[Path] = []
    overrides: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument.startswith("-") and argument != "-":
            flags.append(take_flag(verb, argument, queue))
        elif TARGETS[verb][1] and ("=" not in argument or Path(argument).exists()) and argument[0] not in "~+":
            targets.append(Path(argument))
        else:
            overrides.append(argument)
    overrides = [quoted(override) for override in overrides]
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UsageError(f"{override}: neither key=value nor group=option nor a flag")
    return flags, targets, overrides


def take_flag(verb: str, argument: str, queue: list[str]) -> str:
    """Write a flag and its value, which may be the next word of ``queue``, in one word.  Raises :class:`UsageError`."""
    name, equals, value = argument.partition("=")
    if name == "--experimental-rerun":
        raise UsageError(f"{name}: not supported; it would unpickle a file, which runs any code that is in it")
    if name in FLAGS:
        return argument
    if name not in VALUE_FLAGS:
        value = value or " ".join(queue[:1])
        hint = flag_hint(verb, name, value, [*FLAGS, *VALUE_FLAGS, "--debug"])
        raise UsageError(f"{name}: no such flag{hint}")
    if not equals:
        needs_value = name not in ("--info", "-i")
        if needs_value and not queue:
            raise UsageError(f"{name}: needs a value")
        value = queue.pop(0) if needs_value or (queue and queue[0] in INFO) else "all"
    return f"{VALUE_FLAGS[name]}={value}"


def quoted(override: str) -> str:
    """Quote the value of a free text: Hydra's grammar gives commas, brackets and apostrophes a meaning."""
    key, equals, value = override.partition("=")
    if key not in TEXT_KEYS or not equals or value[:1] in ("'", '"'):
        return override
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"{key}='{escaped}'"


def take(overrides: list[str], prefix: str) -> tuple[Path | None, list[str]]:
    """Return the value of the last override that starts with ``prefix``, and the other overrides."""
    values = [override.removeprefix(prefix) for override in overrides if override.startswith(prefix)]
    others = [override for override in overrides if not override.startswith(prefix)]
    return (Path(values[-1]) if values else None), others


STEP = re.compile(r"\+{0,2}(?:checkpoint\.)?step=(.*)")  # with the group that it had in earlier versions, too


def named_checkpoint(target: Path, overrides: list[str]) -> tuple[Path, int | None, list[str]]:
    """Return the run that ``resume`` is given, the step of its checkpoint if one is named, and the other overrides.

    ``RUN_DIR/checkpoints/step-00000800`` means the same as ``RUN_DIR step=800``.  The step is an argument and no part
    of the composed config: it names where to begin, once.
    """
    matches = [STEP.fullmatch(override) for override in overrides]
    given = [match[1].strip("'\"") for match in matches if match]
    others = [override for override, match in zip(overrides, matches, strict=True) if not match]
    if given and not re.fullmatch(r"\d+|null", given[-1]):
        raise UsageError(f"step={given[-1]}: must be the step of a checkpoint, as in step=800")
    step = int(given[-1]) if given and given[-1] != "null" else None
    path = target.absolute()
    if path.parent.name == CHECKPOINTS and (match := re.fullmatch(r"step-(\d+)", path.name)):
        if step not in (None, int(match[1])):
            raise UsageError(f"step={step}: the target is the checkpoint of step {int(match[1])}; name one")
        run_dir = path.parent.parent
        return run_dir if target.is_absolute() else Path(os.path.relpath(run_dir)), int(match[1]), others
    return target, step, others


def refuse_step(verb: str, overrides: Sequence[str]) -> None:
    """Refuse the step of a checkpoint for a verb that starts anew.  Raises :class:`UsageError`."""
    for match in (STEP.fullmatch(override) for override in overrides):
        if match and verb in ("train", "plan"):
            step = match[1] if match[1].isdigit() else "N"
            raise UsageError(
                f"step={match[1]}: a new run has no checkpoint; resume one with: llmtrain resume RUN_DIR step={step}; "
                f"or take its weights alone: weights=checkpoint weights.path=RUN_DIR/checkpoints/step-{step.zfill(8)}"
            )


def usage(verb: str) -> str:
    """Return the form of the verb's command line."""
    target = {0: "", 1: " RUN_DIR"}.get(TARGETS[verb][1], " DIR…")
    groups = " [group=option]" if verb in ("train", "resume", "plan") else ""
    return f"llmtrain {verb}{target}{groups} [key=value]{' [-m]' * (verb == 'train')}"
