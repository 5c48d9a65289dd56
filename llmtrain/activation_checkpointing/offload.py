"""Tensors that wait for backward in pinned host memory, copied beside the computation.

On a GPU all copies go through one stream of their own.  In forward the computing stream waits for the copy of a tensor
a few tensors later, and only then is its memory free: the host, which runs ahead, cannot make the device hold more.
What was saved last is still on the device when backward begins.  From then on the tensors that backward asks for next
are brought back ahead of time, in the order of the backward pass before.  The host never waits for the device; torch
keeps pinned memory for the next step and hands it out again when its copies are through.

On a CPU copies are made at once, which saves nothing and lets tests run everything else.
"""

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import saved_tensors_hooks

from llmtrain.model import LanguageModel

MIN_BYTES = 1 << 20  # a smaller tensor is not worth a copy's launch
IN_FLIGHT = 4  # tensors whose copy to the host may be under way in forward, and which are fetched ahead in backward
CASTS = {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0"}


def offload(model: LanguageModel) -> "Offloader | None":
    """Have what ``model`` saves for backward, from the token ids to the hidden states, wait in host memory.

    Parameters stay where they are.  A model without data, of which a step is planned, is left alone (None).  Raises
    ValueError where ``model`` is on a CPU.
    """
    parameter = next(model.parameters())
    if is_fake(parameter):
        return None
    device = parameter.device
    if device.type != "cuda":
        raise ValueError(
            f"offload=true: what backward needs is in host memory already, with the model on {device}, and there is "
            "nothing to gain; take offload=false"
        )
    offloader = Offloader(device)
    attach(model, offloader)
    return offloader


def attach(model: LanguageModel, offloader: "Offloader") -> None:
    """Put what the method ``hidden`` of ``model`` saves through ``offloader``."""
    hidden = model.hidden

    @torch.compiler.disable(recursive=False)  # the compiled blocks inside call the hooks when they run
    def offloaded(ids: Tensor, cache: Any = None, segments: Tensor | None = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return hidden(ids, cache, segments)
        offloader.begin(model.parameters())
        with saved_tensors_hooks(offloader.pack, restored):
            return hidden(ids, None, segments)

    model.hidden = offloaded  # type: ignore[method-assign]


def restored(packed: "Tensor | Offloaded") -> Tensor:
    """What was packed, on the device."""
    return packed if isinstance(packed, Tensor) else packed.restore()


class Storage:
    """The memory of one or several saved tensors, and its copy on the host."""

    def __init__(self, forward: "Forward", number: int, source: Tensor) -> None:
        self.forward = forward
        self.number = number  # in the order in which they were saved
        self.source: Tensor | None = source  # on the device, bytes; None once its memory is given back
        self.fetched: tuple[Tensor, Any] | None = None  # back on the device, and the event of the copy
        side = forward.offloader.side
        side.wait_stream(forward.offloader.computing())
        self.host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=forward.offloader.has_streams)
        with forward.offloader.api.stream(side):
            self.host.copy_(source, non_blocking=True)
        self.copied = side.record_event()

    def free(self) -> None:
        """Give the device memory back, to what is computed from here on."""
        self.forward.offloader.computing().wait_event(self.copied)
        self.source = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.source is not None or self.fetched is not None:
            return
        offloader = self.forward.offloader
        # Allocated by the computing stream, so that its memory is that stream's again afterwards; the copy waits for
        # what that stream did with this memory before.
        target = torch.empty(self.host.shape, dtype=torch.uint8, device=offloader.device)
        offloader.side.wait_stream(offloader.computing())
        with offloader.api.stream(offloader.side):
            target.copy_(self.host, non_blocking=True)
        self.fetched = (target, offloader.side.record_event())

    def use(self) -> Tensor:
        """The bytes on the device, for what is computed from here on; the next ones are on their way."""
        computing = self.forward.offloader.computing()
        self.fetch()
        self.forward.asked_for(self.number)
        if self.source is not None:
            computing.wait_event(self.copied)  # by now it is through; then the memory may go when this object does
            return self.source
        assert self.fetched is not None
        target, arrived = self.fetched
        computing.wait_event(arrived)
        return target

    def __del__(self) -> None:
        # Fetched and never used, since backward was broken off, say: the copy must be through before what is computed
        # from here on gets this memory.
        if self.fetched is not None:
            self.forward.offloader.computing().wait_event(self.fetched[1])


class Offloaded:
    """A saved tensor: a view of a :class:`Storage`."""

    def __init__(self, storage: Storage, tensor: Tensor) -> None:
        self.storage = storage
        self.dtype = tensor.dtype
        self.place = (tensor.storage_offset(), tensor.shape, tensor.stride())

    def restore(self) -> Tensor:
        """The tensor, on the device."""
        data = self.storage.use()
        with torch.no_grad():
            return torch.empty(0, dtype=self.dtype, device=data.device).set_(data.untyped_storage(), *self.place)


class Forward:
    """What one forward pass has saved."""

    def __init__(self, offloader: "Offloader") -> None:
        self.offloader = offloader
        self.storages: list[Any] = []  # weak: they live as long as backward's graph does
        self.recent: deque[tuple[tuple[int, int], Storage]] = deque()  # still on the device
        self.order: list[int] = []  # numbers as backward has asked for them
        self.asked: set[int] = set()

    def save(self, tensor: Tensor) -> Storage:
        """The storage of ``tensor``; the same one for another view of it."""
        key = (tensor.untyped_storage()._cdata, tensor._version)
        for known, storage in self.recent:
            if known == key:
                return storage
        data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        with torch.no_grad():
            data.set_(tensor.untyped_storage())
        storage = Storage(self, len(self.storages), data)
        self.storages.append(weakref.ref(storage))
        self.recent.append((key, storage))
        if len(self.recent) > IN_FLIGHT:
            self.recent.popleft()[1].free()
        return storage

    def asked_for(self, number: int) -> None:
        """Backward wants a storage: begin to fetch those that it will want next."""
        if number in self.asked:
            return
        self.asked.add(number)
        self.order.append(number)
        self.recent.clear()  # the graph holds what is still needed
        for coming in self.offloader.after(number, len(self.storages)):
            storage = self.storages[coming]()
            if storage is not None and coming not in self.asked:
                storage.fetch()


class Offloader:
    """Moves saved tensors of ``device`` to the host and back."""

    def __init__(self, device: torch.device, min_bytes: int = MIN_BYTES) -> None:
        self.device = device
        self.min_bytes = min_bytes
        self.has_streams = device.type == "cuda"
        self.api: Any = torch.cuda if self.has_streams else torch.cpu
        self.side: Any = torch.cuda.Stream(device) if self.has_streams else torch.cpu.Stream()
        self.forward = Forward(self)
        self.parameters: set[int] = set()
        self.plan: dict[int, list[int]] = {}  # storages that backward asks for after each, by number
        self.planned = 0  # storages of the forward pass that the plan is of

    def computing(self) -> Any:
        """The stream that computes."""
        return self.api.current_stream(self.device)

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """A forward pass begins."""
        order = self.forward.order
        if order:
            self.plan = {number: order[i + 1 : i + 1 + IN_FLIGHT] for i, number in enumerate(order)}
            self.planned = len(self.forward.storages)
        self.parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.forward = Forward(self)

    def after(self, number: int, count: int) -> list[int]:
        """What backward asks for after ``number``, of ``count`` storages: as the last time, or the other way round."""
        if count == self.planned:
            return self.plan.get(number, [])
        return list(range(number - 1, max(number - 1 - IN_FLIGHT, -1), -1))

    def pack(self, tensor: Tensor) -> Tensor | Offloaded:
        """``tensor`` on its way to the host, or itself where that is not worth it."""
        if tensor.device != self.device or tensor.layout is not torch.strided:
            return tensor
        size = tensor.untyped_storage().nbytes()
        # a small part of a large storage, such as one token's, would bring all of it back
        if size < self.min_bytes or 4 * tensor.nbytes < size or self.is_weight(tensor):
            return tensor
        return Offloaded(self.forward.save(tensor), tensor)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a parameter, or a cast of one, which autocast holds on the device anyway."""
        if tensor.untyped_storage()._cdata in self.parameters:
            return True
        node = tensor.grad_fn
        while node is not None and node.name() in CASTS:
            node = node.next_functions[0][0]
        return node is not None and hasattr(node, "variable") and node is not tensor.grad_fn
