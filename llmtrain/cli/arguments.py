"""Sorting the command line into verb, flags, targets and overrides."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from llmtrain.base.run_files import CHECKPOINTS
from llmtrain.cli.suggestions import instead_of_flag


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
    if path.parent.name == CHECKPOINTS and (match := re.fullmatch(r"step-(\d+)", path.name)):
        if step not in (None, int(match[1])):
            raise UsageError(f"checkpoint.step={step}: the target is the checkpoint of step {int(match[1])}; name one")
        run_dir = path.parent.parent
        return run_dir if target.is_absolute() else Path(os.path.relpath(run_dir)), int(match[1]), others
    return target, step, others


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


class UsageError(ValueError):
    """The command line itself is wrong."""
