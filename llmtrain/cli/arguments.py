"""The parsed command line: verb, flags, targets and overrides."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.base.checks import did_you_mean
from llmtrain.base.files import exists
from llmtrain.base.format import command
from llmtrain.base.run_files import CHECKPOINTS
from llmtrain.cli.mistakes import UsageError, refuse_spaces, refuse_unreadable, stray
from llmtrain.cli.start import split_verb
from llmtrain.config.overrides import key_of
from llmtrain.config.suggestions import flag_hint, keys_named, names_hint

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

FROM = "--from"  # of a new run, beside Hydra's own flags: the run whose settings it begins with

VALUE_FLAGS = {
    FROM: FROM,
    "--cfg": "--cfg", "-c": "--cfg", "--config-dir": "--config-dir", "-cd": "--config-dir",
    "--package": "--package", "-p": "--package", "--info": "--info", "-i": "--info",
}  # fmt: skip

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # values of --info

TEXT_OF = {"generate": "prompt", "predict": "text", "export": "to"}  # verbs that take a text, and its key

OF_A_FILE = ("generate", "predict")  # verbs that take a file of texts
ROWS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz", ".zst")  # the endings of such files

OF_A_MODEL = ("resume", "generate", "chat", "predict", "export", "verify")  # earlier versions: base= for weights.path=

# Settings of Hydra's that a command may change.  Others would make directories beside the run's, or run several jobs
# in one process.
HYDRA_KEYS = ("hydra.searchpath", "hydra.launcher", "hydra.sweeper", "hydra/launcher", "hydra/sweeper",
              "hydra.callbacks", "hydra.job.env_", "hydra.verbose")  # fmt: skip
KEY = re.compile(r"[~+]{0,2}[A-Za-z_$][\w.$@:/-]*")


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
    origin: Path | None = None  # --from: the run whose settings a new one begins with
    notes: tuple[str, ...] = ()  # to show: overrides that others replace


def parse(arguments: Sequence[str]) -> CommandLine:
    """Parse and check everything after ``llmtrain``.  Raises :class:`UsageError`."""
    refuse_unreadable(arguments)
    verb, rest = split_verb(arguments)
    if verb not in VERBS:
        raise UsageError(f"{verb}: no such verb{names_hint(verb, list(VERBS))}")
    refuse_spaces(rest)
    flags, targets, overrides = split(verb, rest)
    for flag in ("--config-dir=", "--cfg=", "--info=", "--package="):
        take(flags, flag)  # refuses two
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
    origin, flags = take(flags, f"{FROM}=")
    step = None
    if verb == "resume" and targets:
        targets[0], step, overrides = named_checkpoint(targets[0], overrides)
    if verb in OF_A_MODEL:
        overrides = [re.sub(r"^\+{0,2}base=", "weights.path=", override) for override in overrides]
    refuse_step(verb, overrides)
    sweep_dir, overrides = take(overrides, "hydra.sweep.dir=")
    refuse_hydra(overrides)
    overrides, notes = without_repeated(overrides)
    directory = Path(sweep_dir.strip("'\"")) if sweep_dir else None
    return CommandLine(
        verb, flags, targets, overrides, ["llmtrain", *arguments], helps, only_shows,
        multirun and not helps and verb == "train", step, directory,
        Path(origin) if origin else None, notes,
    )  # fmt: skip


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
    words = [str(target) for target in targets if not os.path.isdir(target)]  # noqa: PTH112 (False for impossible names)
    beyond = words if len(words) < len(targets) else words[1:]
    if len(beyond) > 1 and keys_named(verb, beyond[0]):
        return stray(verb, beyond[0], beyond[1:])
    text = " ".join(words if 0 < len(words) < len(targets) else map(str, targets[1:]))
    if verb not in TEXT_OF:
        return f"{text}: neither key=value nor a directory that this verb takes; as in: {command(verb, 'RUN_DIR')}"
    is_file = verb in OF_A_FILE and len(beyond) < 2 and Path(text).suffix in ROWS
    key = "file" if is_file else TEXT_OF[verb]
    written = (
        shlex.quote(text) if re.search(r'["$`!\\]', text) or key != TEXT_OF.get(verb) or key == "to" else f'"{text}"'
    )
    what = {"to": "the directory to write", "file": "a file of texts"}.get(key, f"a {key}")
    return f"{text}: not key=value; for {what}: {key}={written}, as in: llmtrain {verb} RUN_DIR {key}={written}"


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
        elif TARGETS[verb][1] and (exists(argument) or ("=" not in argument and argument[0] not in "~+")):
            targets.append(Path(argument))
        else:
            overrides.append(argument)
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UsageError(
                stray(verb, override, [word for word in overrides if "=" not in word and word != override])
            )
        if not KEY.fullmatch(override.partition("=")[0]):
            raise UsageError(
                f"{override}: {override.partition('=')[0]!r} is no key; key=value, as in optimizer.lr=1e-3"
            )
    return flags, targets, overrides


def take_flag(verb: str, argument: str, queue: list[str]) -> str:
    """Write a flag and its value, which may be the next word of ``queue``, in one word.  Raises :class:`UsageError`."""
    name, equals, value = argument.partition("=")
    if name == "--":
        raise UsageError("--: not needed; whatever has no dash is a key=value, a group=option or a directory")
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
    allowed = {"--cfg": ("job", "hydra", "all"), "--info": INFO}.get(VALUE_FLAGS[name])
    if allowed and value not in allowed:
        raise UsageError(f"{name}={value}: must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}")
    if name == FROM and verb != "train":
        raise UsageError(
            f"{FROM} {value}: only for a new run, as in: llmtrain train {FROM} RUN_DIR loop.max_steps=4000"
        )
    return f"{VALUE_FLAGS[name]}={value}"


def take(words: list[str], prefix: str) -> tuple[str | None, list[str]]:
    """Return the value of the one word that starts with ``prefix``, and the other words."""
    values = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    if len(set(values)) > 1:
        raise UsageError(f"{prefix}{values[-1]}: {prefix}{values[0]} is given too; name one")
    return (values[-1] if values else None), [word for word in words if not word.startswith(prefix)]


def without_repeated(overrides: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Drop overrides of a key that a later one changes again; returns the rest, and a note on each dropped one."""
    last = {key_of(override): override for override in overrides}
    dropped = [(override, last[key_of(override)]) for override in overrides if last[key_of(override)] != override]
    kept = [override for override in dict.fromkeys(overrides) if last[key_of(override)] == override]
    return kept, tuple(f"{before} and {now}: the same key; the last one counts" for before, now in dropped)


def refuse_hydra(overrides: Sequence[str]) -> None:
    """Refuse settings of Hydra's that would write elsewhere, or change the way in which jobs are run."""
    for override in overrides:
        name = override.partition("=")[0].lstrip("+~")
        if re.split(r"[./]", name)[0] == "hydra" and not name.startswith(HYDRA_KEYS):
            remedy = {
                "hydra.run.dir": "run_dir=DIR names the directory of a run", "hydra.mode": "-m runs a sweep",
                "hydra.sweep.subdir": "hydra.sweep.dir=DIR names the folder of a sweep's runs",
            }.get(name, "these can: hydra.sweep.dir, hydra.searchpath, hydra/launcher, hydra/sweeper")  # fmt: skip
            raise UsageError(f"{override}: this setting of Hydra's cannot be changed; {remedy}")


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
    origin = " [--from RUN_DIR]" if verb == "train" else ""
    groups = " [group=option]" if verb in ("train", "resume", "plan") else ""
    return f"llmtrain {verb}{target}{origin}{groups} [key=value]{' [-m]' * (verb == 'train')}"
