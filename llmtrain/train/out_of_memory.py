"""Out-of-memory errors, and retries with smaller batches."""

import re
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class RankOutOfMemory(RuntimeError):
    """Memory ran out on one of several ranks, which cannot repeat the step alone: the others wait for it.

    ``smaller_micro_batch``: the size with which all of them can go on from the last checkpoint; 0: there is none.
    """

    def __init__(self, message: str, smaller_micro_batch: int) -> None:
        super().__init__(message)
        self.smaller_micro_batch = smaller_micro_batch


# Only torch's own allocator raises OutOfMemoryError.  The libraries below it take memory of their own (handles,
# workspaces, code, pinned host memory), and their errors differ in the text alone.  Triton's "out of resource" is
# another matter: a kernel that asks for more shared memory than the GPU has, whatever the batch.
TEXTS = re.compile(
    r"\b(?:CUDA|HIP|XPU|MPS|Triton)\b[^\n]{0,24}\bout of memory\b"  # torch, the runtime, the driver, Triton
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory"
    r"|_STATUS_ALLOC_FAILED\b"  # cuBLAS, cuDNN before 9, cuSOLVER, cuSPARSE, hipBLAS
    r"|CUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED"
    r"|miopenStatusAllocFailed|rocblas_status_memory_error"
    # without memory for a handle these two libraries give the reason of a missing driver
    r"|(?:CUBLAS_STATUS_NOT_INITIALIZED|CUSOLVER_STATUS_INTERNAL_ERROR),? when calling `(?:cublas|cusolverDn)Create"
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that the device or the host had no memory for a tensor, a workspace or a kernel.

    So does one that was raised because of such an error, as the end of a CUDA graph's recording is.
    """
    chained: BaseException | None = error
    while chained is not None:
        if isinstance(chained, torch.OutOfMemoryError):
            return True
        if isinstance(chained, RuntimeError) and TEXTS.search(str(chained)):
            return True
        chained = chained.__cause__ or chained.__context__
    return False


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
