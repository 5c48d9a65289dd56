"""Offloading of saved tensors to pinned host memory, with copies that overlap the computation.

On a GPU all copies go through one separate stream.  In forward the computing stream waits for the copy of a tensor a
few tensors later, and only then frees its memory: the host, which runs ahead, cannot make the device hold more.  The
tensors saved last are still on the device when backward begins.  From then on the tensors that backward needs next are
prefetched, in the order of the previous backward pass.  The host never waits for the device.

The host memory of a tensor that is no longer needed is used again at once (``HostPool``).  That is safe without an
event: only copies read and write it, all of them are queued on the one stream, and that stream keeps their order, so a
new tensor is copied in after the old one has been copied out.

On a CPU copies are made at once, which saves nothing and lets tests run everything else.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import saved_tensors_hooks

from llmtrain.activation_checkpointing.host_pool import HostPool, Piece
from llmtrain.base.device import device_type
from llmtrain.base.host_memory import HostMemory, Registration, registration_for
from llmtrain.model import LanguageModel

MIN_BYTES = 1 << 20  # smaller tensors do not repay the launch of a copy
IN_FLIGHT = 4  # number of tensors being copied to the host in forward, and prefetched in backward
CASTS = {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0"}


def offload(model: LanguageModel) -> "Offloader | None":
    """Offload the tensors that ``model`` saves for backward, from the token ids to the hidden states, to host memory.

    Parameters stay on the device.  A model on meta, whose sizes alone are asked for, is not changed (None is returned).
    Raises ValueError if ``model`` is on a CPU.
    """
    parameter = next(model.parameters())
    device = parameter.device
    if device.type == "meta":
        return None
    if device_type(parameter) != "cuda":
        raise ValueError(
            f"offload=true: what backward needs is in host memory already, with the model on {device}, and there is "
            "nothing to gain; take offload=false"
        )
    offloader = Offloader(device, is_traced=is_fake(parameter))
    attach(model, offloader)
    return offloader


def attach(model: LanguageModel, offloader: "Offloader") -> None:
    """Route the tensors that the method ``hidden`` of ``model`` saves through ``offloader``."""
    hidden = model.hidden

    @torch.compiler.disable(recursive=False)  # the compiled blocks inside call the hooks when they run
    def hidden_with_offload(ids: Tensor, cache: Any = None, segments: Tensor | None = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return hidden(ids, cache, segments)
        offloader.begin(model.parameters())
        with saved_tensors_hooks(offloader.pack, unpack):
            return hidden(ids, None, segments)

    model.hidden = hidden_with_offload  # type: ignore[method-assign]


def unpack(packed: "Tensor | OffloadedTensor") -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.restore()


class Storage:
    """The memory of one or several saved tensors, and its copy on the host."""

    def __init__(self, forward: "ForwardPass", number: int, source: Tensor) -> None:
        self.forward = forward
        self.number = number  # in the order of saving
        self.source: Tensor | None = source  # bytes on the device; None once freed
        self.fetched: tuple[Tensor, Any] | None = None  # copy on the device, and the event of that copy
        self.num_bytes = source.nbytes
        side, host = forward.offloader.side, forward.offloader.host
        self.pieces: list[Piece] = host.take(source.nbytes)
        weakref.finalize(self, host.give, self.pieces).atexit = False
        side.wait_stream(forward.offloader.computing())
        with forward.offloader.api.stream(side):
            for piece, part in self._parts(source):
                piece.copy_(part, non_blocking=True)
        self.copied = side.record_event()

    def _parts(self, data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces on the host, each with its part of ``data`` on the device."""
        start = 0
        for piece in self.forward.offloader.host.tensors(self.pieces, self.num_bytes):
            yield piece, data[start : start + piece.nbytes]
            start += piece.nbytes

    def free(self) -> None:
        """Free the device memory, for use by later kernels."""
        self.forward.offloader.computing().wait_event(self.copied)
        self.source = None

    def fetch(self) -> None:
        """Start the copy back to the device."""
        if self.source is not None or self.fetched is not None:
            return
        offloader = self.forward.offloader
        # Allocated by the computing stream, so that its memory returns to that stream; the copy waits for earlier uses
        # of this memory on that stream.
        target = torch.empty(self.num_bytes, dtype=torch.uint8, device=offloader.device)
        offloader.side.wait_stream(offloader.computing())
        with offloader.api.stream(offloader.side):
            for piece, part in self._parts(target):
                part.copy_(piece, non_blocking=True)
        self.fetched = (target, offloader.side.record_event())

    def use(self) -> Tensor:
        """Return the bytes on the device, for later kernels, and prefetch the next storages."""
        computing = self.forward.offloader.computing()
        self.fetch()
        self.forward.on_use(self.number)
        if self.source is not None:
            computing.wait_event(self.copied)  # the copy is complete; the memory may be freed with this object
            return self.source
        assert self.fetched is not None
        target, arrived = self.fetched
        computing.wait_event(arrived)
        return target

    def __del__(self) -> None:
        # Fetched and never used (backward was interrupted): the copy must be complete before later kernels reuse this
        # memory.
        if self.fetched is not None:
            self.forward.offloader.computing().wait_event(self.fetched[1])


def _close(host: HostPool, side: Any) -> None:
    """Give the host memory back, after the last copy."""
    if isinstance(side, torch.cuda.Stream):
        side.synchronize()
    host.close()


class OffloadedTensor:
    """A saved tensor: a view of a :class:`Storage`."""

    def __init__(self, storage: Storage, tensor: Tensor) -> None:
        self.storage = storage
        self.dtype = tensor.dtype
        self.place = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def restore(self) -> Tensor:
        data = self.storage.use()
        with torch.no_grad():
            return data.view(self.dtype).as_strided(*self.place)


class ForwardPass:
    """Record of the tensors that one forward pass has saved."""

    def __init__(self, offloader: "Offloader") -> None:
        self.offloader = offloader
        self.storages: list[Any] = []  # weak: they live as long as backward's graph does
        self.recent: deque[tuple[tuple[int, int], Storage]] = deque()  # still on the device
        self.order: list[int] = []  # numbers in the order in which backward used them
        self.used: set[int] = set()

    def save(self, tensor: Tensor) -> Storage:
        """Return the storage of ``tensor``; views of one tensor share it."""
        key = (tensor.untyped_storage()._cdata, tensor._version)
        for known, storage in self.recent:
            if known == key:
                return storage
        elements = tensor.untyped_storage().nbytes() // tensor.itemsize
        data = tensor.detach().as_strided((elements,), (1,), 0).view(torch.uint8)
        storage = Storage(self, len(self.storages), data)
        self.storages.append(weakref.ref(storage))
        self.recent.append((key, storage))
        if len(self.recent) > IN_FLIGHT:
            self.recent.popleft()[1].free()
        return storage

    def on_use(self, number: int) -> None:
        """Record that backward uses a storage; prefetch those that it will use next."""
        if number in self.used:
            return
        self.used.add(number)
        self.order.append(number)
        self.recent.clear()  # the graph holds the storages that are still needed
        for coming in self.offloader.after(number, len(self.storages)):
            storage = self.storages[coming]()
            if storage is not None and coming not in self.used:
                storage.fetch()


class TracedMemory(HostMemory):
    """Host memory in the trace of a step: a tensor without data, on meta, as those of the device are on a CPU."""

    def __init__(self, num_bytes: int, registration: Registration | None = None) -> None:
        super().__init__(0)
        self.data = torch.empty(num_bytes, dtype=torch.uint8, device="meta")


class Offloader:
    """Moves saved tensors of ``device`` to the host and back; ``is_traced``: they have no data."""

    def __init__(
        self, device: torch.device, min_bytes: int = MIN_BYTES, host: HostPool | None = None, *, is_traced: bool = False
    ) -> None:
        self.device = device
        self.min_bytes = min_bytes
        on_gpu = device.type == "cuda" and not is_traced
        self.api: Any = torch.cuda if on_gpu else torch.cpu
        self.side: Any = torch.cuda.Stream(device) if on_gpu else torch.cpu.Stream()
        if host is None:
            host = HostPool(None, memory=TracedMemory) if is_traced else HostPool(registration_for(device))
        self.host = host
        weakref.finalize(self, _close, self.host, self.side).atexit = False
        self.forward = ForwardPass(self)
        self.parameters: set[int] = set()
        self.plan: dict[int, list[int]] = {}  # numbers of the storages that backward uses next, by number
        self.planned = 0  # number of storages in the forward pass that the plan was made from

    def computing(self) -> Any:
        return self.api.current_stream(self.device)

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin the record of a forward pass."""
        order = self.forward.order
        if order:
            self.plan = {number: order[i + 1 : i + 1 + IN_FLIGHT] for i, number in enumerate(order)}
            self.planned = len(self.forward.storages)
        self.forward.recent.clear()  # of a pass without backward: it would be freed by the garbage collector alone
        self.parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.forward = ForwardPass(self)

    def after(self, number: int, count: int) -> list[int]:
        """Return the storages (of ``count``) that backward uses after ``number``: as last time or in reverse."""
        if count == self.planned:
            return self.plan.get(number, [])
        return list(range(number - 1, max(number - 1 - IN_FLIGHT, -1), -1))

    def pack(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """Start the copy of ``tensor`` to the host; return ``tensor`` itself if that is not worthwhile."""
        if tensor.device != self.device or tensor.layout is not torch.strided:
            return tensor
        size = tensor.untyped_storage().nbytes()
        # a small part of a large storage, such as one token's, would fetch all of it; 16: views of every type divide it
        if size % 16 or size < self.min_bytes or 4 * tensor.nbytes < size or self.is_weight(tensor):
            return tensor
        return OffloadedTensor(self.forward.save(tensor), tensor)

    def is_weight(self, tensor: Tensor) -> bool:
        """Return True for a parameter and for a cast of one, which autocast holds on the device anyway."""
        if tensor.untyped_storage()._cdata in self.parameters:
            return True
        node = tensor.grad_fn
        while node is not None and node.name() in CASTS:
            node = node.next_functions[0][0]
        return node is not None and hasattr(node, "variable") and node is not tensor.grad_fn
