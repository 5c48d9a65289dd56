"""A limit of memory on any device: operations beyond it fail as those of a full GPU do."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryLimit(TorchDispatchMode):
    """Counts the storages that operations within the context make, while they live; ``peak`` is the most bytes."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit = limit
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):  # from before the context: not counted, also if the result shares its memory
                self._add(tensor.untyped_storage(), 0)
        before = self.live
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        if self.live > max(self.limit, before):  # an operation that takes no memory runs in a full device as well
            raise torch.OutOfMemoryError(f"CUDA out of memory. {self.live} bytes of {self.limit}")
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that the tensors made by ``work`` take at once."""
    with MemoryLimit() as limit:
        work()
    return limit.peak
