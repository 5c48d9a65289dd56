"""Copies of weights and optimizer state in host memory, made while training continues."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmtrain.base.host_memory import HostMemory, Registration, aligned

COPY_BYTES = 1 << 24  # copied at once on a CPU

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """The places of named tensors in one block of memory, one after the other."""

    tensors: tuple[tuple[str, torch.Size, torch.dtype], ...]

    @classmethod
    def of(cls, tensors: Tensors) -> "Layout":
        """The layout of copies of ``tensors``."""
        return cls(tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))

    @property
    def num_bytes(self) -> int:
        """Bytes of the block: those of the tensors, each rounded up to the alignment."""
        return sum(aligned(shape.numel() * dtype.itemsize) for _, shape, dtype in self.tensors)

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The tensors in the bytes ``block``."""
        views, start = {}, 0
        for name, shape, dtype in self.tensors:
            num_bytes = shape.numel() * dtype.itemsize
            views[name] = block[start : start + num_bytes].view(dtype).view(shape)
            start += aligned(num_bytes)
        return views


def layouts_of(groups: Mapping[str, Tensors]) -> dict[str, Layout]:
    """The layouts of copies of ``groups`` of tensors."""
    return {group: Layout.of(tensors) for group, tensors in groups.items()}


class Snapshot:
    """Host copies of groups of tensors at one moment: a block of memory for each group, which the next save reuses.

    On a GPU the copies are queued on a stream of their own, into pinned memory.  The order that makes this safe:

    1. :meth:`begin`: the copying stream waits for the computing stream, so for the update that wrote the tensors.
    2. :meth:`before_change`: the computing stream waits for the event after the last copy, so no update overtakes one.
    3. :meth:`finish`: the writing thread waits for the same event before it reads the memory.
    4. The next :meth:`begin` comes after the end of the writing, so nothing is copied over what is still being written.

    Where the memory is not pinned, on a CPU or because CUDA refuses, a queued copy would hold up the host.  The writing
    thread makes the copies instead, the first order holds as before, and :meth:`before_change` waits for the thread.
    """

    def __init__(self, device: torch.device, registration: Registration | None) -> None:
        self.device = device
        self.registration = registration
        self.copies: dict[str, dict[str, Tensor]] = {}
        self._memory: dict[str, tuple[Layout, HostMemory]] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []  # copy, source
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._event: torch.cuda.Event | None = None  # after the last copy, where the device makes them
        self._copied = threading.Event()
        self._copied.set()

    @property
    def refusal(self) -> str | None:
        """The reason why memory that was to be pinned is not."""
        return next((memory.refusal for _, memory in self._memory.values() if memory.refusal), None)

    def make(self, layouts: Mapping[str, Layout]) -> None:
        """Make the memory for tensors of ``layouts``, where there is none yet; pinning takes a second for some GB.

        Raises OSError if the system has no memory left.
        """
        for group, layout in layouts.items():
            if group in self._memory and self._memory[group][0] == layout:
                continue
            self._release(group)
            memory = HostMemory(layout.num_bytes, self.registration)
            self._memory[group] = layout, memory
            self.copies[group] = layout.views(memory.data)

    def begin(self, **groups: Tensors) -> None:
        """Start to copy the tensors, which must not change until :meth:`before_change` has returned."""
        self.make(layouts_of(groups))
        self._pairs = [
            (self.copies[group][name], tensor.detach())
            for group, tensors in groups.items()
            for name, tensor in tensors.items()
        ]
        self._event = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        if self._stream is None or self.refusal is not None:
            self._copied.clear()
            return
        with torch.cuda.stream(self._stream):
            for copy, source in self._pairs:
                copy.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(self._stream)

    def finish(self) -> None:
        """In the writing thread: copy, or wait until the device has copied."""
        try:
            if self._event is not None:
                self._event.synchronize()
            elif self._stream is not None:
                with torch.cuda.stream(self._stream):
                    for copy, source in self._pairs:
                        copy.copy_(source)  # the thread waits; Python's lock is free meanwhile
            else:
                for copy, source in self._pairs:
                    _copy(copy, source)
        finally:
            self._pairs = []
            self._copied.set()

    def before_change(self) -> None:
        """In the training thread, before the update: wait for the copy; with pinned memory only the stream waits."""
        if self._event is not None:
            torch.cuda.current_stream(self.device).wait_event(self._event)
        elif not self._copied.is_set():
            self._copied.wait()

    def close(self) -> None:
        """Give the memory back.  No copy may be under way."""
        for group in list(self._memory):
            self._release(group)

    def _release(self, group: str) -> None:
        self.copies.pop(group, None)
        if group in self._memory:
            self._memory.pop(group)[1].close()


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy on one thread and without Python's lock; torch would start threads that compete with training's."""
    if not source.is_contiguous():
        target.copy_(source)
        return
    left, right = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (target, source))
    for start in range(0, len(right), COPY_BYTES):
        np.copyto(left[start : start + COPY_BYTES], right[start : start + COPY_BYTES])
