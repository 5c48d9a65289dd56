"""Messages and exit statuses of errors: the one place that turns an exception into words."""

import re
from collections.abc import Sequence
from pathlib import Path

from llmtrain.base.invocation import FAILED, USAGE_ERROR
from llmtrain.cli.machine_errors import explain_machine
from llmtrain.cli.suggestions import key_hint, names_hint


def explain(error: BaseException, verb: str) -> tuple[str | None, int]:
    """Return one message for the user, None for a bug of ours, and the exit status."""
    if isinstance(error, MemoryError | ImportError) and (message := explain_machine(error)) is not None:
        return message, FAILED  # before anything else is imported
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.options is not None:
        return explain_option(error.missing_cfg_file or "", error.options), USAGE_ERROR
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain_override(error, verb), USAGE_ERROR
    if type(error).__name__ in ("TrainingFailed", "DataError", "SamplingFailed"):  # by name: their modules import torch
        return str(error), FAILED
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "a smaller accumulation.micro_batch_size keeps the batch and needs less memory"
        return f"out of memory on the device: {str(error).splitlines()[0]} ({remedy})", FAILED
    if (message := explain_machine(error)) is not None:
        return message, FAILED
    if isinstance(error, ValueError) and raised_by_us(error):
        return str(error), USAGE_ERROR
    return None, FAILED


def explain_option(config_file: str, options: Sequence[str]) -> str:
    """Return the message for an option that its group does not have."""
    group, _, option = config_file.rpartition("/")
    if group == "data" and (Path(option).exists() or "." in option or "/" in option):
        return f"{group}={option}: no such option; to train on a file: data=text data.path={option}"
    return f"{group}={option}: no such option{names_hint(option, sorted(options))}"


def explain_override(error: BaseException, verb: str) -> str:
    """Return the message for an override that Hydra or OmegaConf refuses."""
    key = find_key(error)
    if key is not None:
        return f"{key}: no such key{key_hint(key, verb)}"
    message = str(error).strip().splitlines()[0]
    if match := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'$", message):
        key, value = match[1], match[2]
        return (
            f"{key}={value}: several values; if it takes a list: '{key}=[{value}]'; if each value is a run of its "
            f"own, a sweep: -m; if it is one text with a comma: '{key}=\"{value}\"'"
        )
    return message


def raised_by_us(error: BaseException) -> bool:
    """Return whether this package or a plugin raised ``error``; a library's ValueError is no mistake of the user's."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.split(".")[0] not in ("torch", "numpy", "safetensors", "tiktoken", "rich", "matplotlib", "json")


def find_key(error: BaseException | None) -> str | None:
    """Find the key that Hydra or OmegaConf does not know; None if the error has another cause."""
    while error is not None:
        if match := re.search(r"Key '([^']+)' is not in struct(?:.*?full_key: (\S+))?", str(error), re.DOTALL):
            return match[2] or match[1]
        if match := re.search(r"Could not override '([^']+)'", str(error)):
            return match[1]
        error = error.__cause__
    return None
