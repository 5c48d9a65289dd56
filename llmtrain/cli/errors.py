"""Messages and exit statuses of errors: the one place that turns an exception into words."""

import errno
import sys
from collections.abc import Sequence

from llmtrain.base.invocation import FAILED, USAGE_ERROR
from llmtrain.cli.machine_errors import explain_machine


def explain(error: BaseException, verb: str, arguments: Sequence[str] = ()) -> tuple[str | None, int]:
    """Return one message for the user, None for a bug of ours, and the exit status."""
    if isinstance(error, MemoryError | ImportError) and (message := explain_machine(error)) is not None:
        return message, FAILED  # before anything else is imported
    from llmtrain.config.explain import explain_composition

    if (message := explain_composition(error, verb, arguments)) is not None:
        return message, USAGE_ERROR
    # by name: their modules import torch
    if type(error).__name__ in ("TrainingFailed", "DataError", "SamplingFailed", "RankOutOfMemory"):
        return str(error), FAILED
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "a smaller accumulation.micro_batch_size keeps the batch and needs less memory"
        return f"out of memory on the device: {str(error).splitlines()[0]} ({remedy})", FAILED
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename}: {error.strerror}", USAGE_ERROR
    if (message := explain_machine(error)) is not None:
        return message, FAILED
    if (message := explain_lost_rank(error)) is not None:
        return message, FAILED
    if isinstance(error, ValueError) and raised_by_us(error):
        return str(error), USAGE_ERROR
    return None, FAILED


def raised_by_us(error: BaseException) -> bool:
    """Return whether this package or a plugin raised ``error``; a library's ValueError is no mistake of the user's."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.split(".")[0] not in ("torch", "numpy", "safetensors", "tiktoken", "rich", "matplotlib", "json")


def explain_lost_rank(error: BaseException) -> str | None:
    """Return the message for an exchange that failed because another rank is gone; None for any other error."""
    if "torch.distributed" not in sys.modules or not isinstance(error, RuntimeError):
        return None
    from llmtrain.distributed.supervision import Kind, kind_of

    if kind_of(error) is not Kind.consequence:
        return None
    return f"the connection to another rank has ended: {str(error).strip().splitlines()[0]}"
