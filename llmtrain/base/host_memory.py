"""Host memory of an exact size, pinned for the copies of a GPU.

``torch.empty(..., pin_memory=True)`` rounds every block up to a power of two: 28.2 GB for the 18.7 GB of GPT-2 1558M's
checkpoint.  A setting of torch's allocator against that would hold for the whole process, and not every supported torch
has it.  So memory is mapped here, as much as is needed, and registered with CUDA (``cudaHostRegister``, which torch
has under the same name for ROCm).
"""

import mmap
import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a tensor of any type can start at a multiple
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU of the process, whichever thread registers


def aligned(num_bytes: int) -> int:
    """Round up to a multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Registration(Protocol):
    """Pinning of memory that exists."""

    def pin(self, data: Tensor) -> str | None:
        """Pin the bytes ``data``; return the reason if that is refused."""

    def unpin(self, address: int) -> None:
        """Undo it for the bytes at ``address``; no copy may be under way."""


class HostMemory:
    """A block of ``num_bytes`` of host memory, pinned by ``registration`` (None: plain memory) until it is closed.

    Raises OSError if the system has no memory left.
    """

    def __init__(self, num_bytes: int, registration: Registration | None = None) -> None:
        self.data = torch.empty(0, dtype=torch.uint8)
        self.refusal: str | None = None  # the reason why the bytes are not pinned, although they were to be
        self._finalizer: weakref.finalize | None = None
        if not num_bytes:
            return
        block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):  # else a write after a fork would move the page away from the device
            block.madvise(mmap.MADV_DONTFORK)
        self.data = torch.frombuffer(block, dtype=torch.uint8)  # holds the block
        if registration is not None:
            self.refusal = registration.pin(self.data)
            if self.refusal is None:
                self._finalizer = weakref.finalize(self, registration.unpin, self.data.data_ptr())
                self._finalizer.atexit = False  # CUDA may be down already; the end of the process frees the memory

    def close(self) -> None:
        """Unpin the bytes.  No copy may be under way."""
        if self._finalizer is not None:
            self._finalizer()


class CudaRegistration:
    """Registration with CUDA: the copies that ``device`` makes do not hold up the host."""

    def __init__(self, device: torch.device) -> None:
        self.index = torch.cuda.current_device() if device.index is None else device.index

    def pin(self, data: Tensor) -> str | None:
        """Pin the bytes ``data``; return the reason if CUDA refuses.

        CUDA keeps the error of a call that failed for the thread that made it, and torch would raise it at that
        thread's next kernel; so the call is made by a thread of its own.
        """
        data.numpy()[:: mmap.PAGESIZE] = 0  # maps the pages, which CUDA would do while it locks out other calls
        found: list[str | None] = []

        def register() -> None:
            try:
                found.append(self._register(data.data_ptr(), data.nbytes))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=register, name="pin")
        thread.start()
        thread.join()
        return found[0]

    def _register(self, address: int, num_bytes: int) -> str | None:
        with torch.cuda.device(self.index):
            runtime: Any = torch.cuda.cudart()
            code = int(runtime.cudaHostRegister(address, num_bytes, PORTABLE))
            return None if code == 0 else f"CUDA: {runtime.cudaGetErrorString(runtime.cudaError(code))}"

    def unpin(self, address: int) -> None:
        """End the registration of the bytes at ``address``.

        A failure means that CUDA itself has failed, which its next call reports.
        """
        with torch.cuda.device(self.index):
            torch.cuda.cudart().cudaHostUnregister(address)


def registration_for(device: torch.device) -> CudaRegistration | None:
    """The registration of memory that ``device`` copies to and from; None for a CPU."""
    return CudaRegistration(device) if device.type == "cuda" else None
