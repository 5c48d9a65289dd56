"""One message and an exit status for whatever went wrong."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.base.invocation import FAILED, USAGE_ERROR
from llmtrain.cli.suggestions import nearest, suggest_key

if TYPE_CHECKING:
    pass


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
    if type(error).__name__ in ("TrainingFailed", "DataError"):
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
