"""A stand-in for CUDA's registration of host memory."""

import threading

from torch import Tensor


class Registry:
    """Records what is pinned; refuses with the reason ``refuses``, and waits for ``held`` first."""

    def __init__(self, refuses: str | None = None, held: threading.Event | None = None) -> None:
        self.refuses, self.held = refuses, held
        self.pinned: dict[int, int] = {}  # bytes by address
        self.calls: list[str] = []
        self.threads: set[str] = set()

    def pin(self, data: Tensor) -> str | None:
        if self.held is not None:
            assert self.held.wait(30)
        self.calls.append(f"pin {data.nbytes}")
        self.threads.add(threading.current_thread().name.split("_")[0])
        if self.refuses is None:
            self.pinned[data.data_ptr()] = data.nbytes
        return self.refuses

    def unpin(self, address: int) -> None:
        self.calls.append(f"unpin {self.pinned.pop(address)}")
