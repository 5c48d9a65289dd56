"""Out-of-memory errors, and retries with smaller batches."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that the device or the host had no memory for a tensor."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def halve_on_out_of_memory(
    work: Callable[[int], T], size: int, on_halved: Callable[[int, str], None] = lambda size, message: None
) -> T:
    """Return ``work(size)``; whenever memory runs out, halve ``size``, call ``on_halved(size, message)`` and retry.

    Raises the last error if a size of 1 does not fit either.
    """
    while True:
        try:
            return work(size)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            message = str(error).splitlines()[0]
        # Outside the handler, where the traceback no longer holds the tensors of the attempt.
        size = (size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        on_halved(size, message)
