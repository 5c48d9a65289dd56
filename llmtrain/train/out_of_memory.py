"""Running out of device memory, and going on with less at once."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host's allocator, had no room for a tensor."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def halve_on_out_of_memory(
    work: Callable[[int], T], size: int, on_halved: Callable[[int, str], None] = lambda size, message: None
) -> T:
    """``work(size)``, again with half of ``size`` whenever memory runs out; ``note`` hears of each new size.

    Raises the last error where a size of 1 does not fit either.
    """
    while True:
        try:
            return work(size)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            message = str(error).splitlines()[0]
        # Out of the handler, so that the traceback has let go of the tensors of the attempt.
        size = (size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        on_halved(size, message)
