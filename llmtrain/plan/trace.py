"""One training step on tensors without data, every storage counted while it lives.

The step is the run's own code on :class:`FakeTensorMode` tensors, which have shapes, types and a device and no memory.
So whatever a model, an objective or a precision does, chunked losses, recomputation and copies to the host included, is
followed and not assumed.  What a kernel takes for itself while it runs is not seen.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmtrain.optimizer import step as optimizer_step
from llmtrain.plan.blueprint import Blueprint, Built

# Of an update: one that goes through the parameters piece by piece takes tens of thousands, all alike, and begins with
# the embedding, the largest.
UPDATE_OPERATIONS = 1000


class Category(IntEnum):
    """What memory is for."""

    weights = 0
    gradients = 1
    optimizer = 2
    activations = 3  # kept from the forward for the backward pass, weights cast by autocast included
    logits = 4  # whatever has a row of the whole vocabulary for each token: logits, their softmax, their gradient
    temporary = 5  # everything else: what an operation reads, writes and drops


class Phase(IntEnum):
    """A part of the step."""

    held = 0  # what is there between two steps
    forward = 1
    backward = 2
    update = 3  # clipping and the optimizer's step


@dataclass
class Event:
    """A storage that comes (bytes above 0) or goes (below)."""

    storage: int
    num_bytes: int


@dataclass
class Span:
    """The operations of one phase: their names, and the storages that came and went with each."""

    phase: Phase
    names: list[str] = field(default_factory=list)
    events: list[list[Event]] = field(default_factory=list)

    def begin(self, name: str) -> None:
        """A new operation."""
        self.names.append(name)
        self.events.append([])


@dataclass
class Trace:
    """A whole optimizer step."""

    spans: list[Span]
    categories: dict[int, Category]  # of each storage on the device
    host_bytes: int  # most bytes at once on the host, where the device is another

    def timeline(self) -> list[np.ndarray]:
        """Live bytes after each operation, one array ``(operations, categories)`` a span."""
        live = np.zeros(len(Category), dtype=np.int64)
        result = []
        for span in self.spans:
            rows = np.zeros((len(span.names), len(Category)), dtype=np.int64)
            for row, events in zip(rows, span.events, strict=True):
                peak = live.copy()
                for event in events:
                    live[self.categories[event.storage]] += event.num_bytes
                    if live.sum() > peak.sum():
                        peak = live.copy()
                row[:] = peak  # what an operation frees is there while it runs
            result.append(rows)
        return result


class Enough(Exception):
    """So many operations tell what there is to know."""


class Recorder(TorchDispatchMode):
    """Notes every storage on ``device`` that an operation makes, and when it is let go."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.spans = [Span(Phase.held, ["held"], [[]])]
        self.shapes: dict[int, tuple[tuple[int, ...], Phase]] = {}  # of the first tensor on a storage, and when made
        self.host_live = self.host_peak = 0
        self.limit: int | None = None  # operations of a phase
        self._ids: dict[int, int] = {}  # python id of a live storage -> our number
        self._numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:  # .item(): there is no data to read
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if function is torch.ops.prim.device.default:  # every other call; no operation
            return args[0].fake_device
        span = self.spans[-1]
        if self.limit is not None and len(span.names) > self.limit:
            raise Enough
        result = function(*args, **(kwargs or {}))
        span.begin(str(function))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def phase(self, phase: Phase) -> None:
        """A new part of the step begins."""
        self.spans.append(Span(phase, [f"begin {phase.name}"], [[]]))

    def note(self, tensor: Tensor) -> int | None:
        """The number of the tensor's storage; None for one that is not on the device."""
        if tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ids:
            return self._ids[key]
        number = self._numbers = self._numbers + 1
        size = storage.nbytes()
        on_device = tensor.device.type == self.device.type
        self._ids[key] = number
        if on_device:
            self.shapes[number] = (tuple(tensor.shape), self.spans[-1].phase)
            self.spans[-1].events[-1].append(Event(number, size))
        else:
            self.host_live += size
            self.host_peak = max(self.host_peak, self.host_live)
        weakref.finalize(storage, self._gone, key, number, size, on_device)
        return number

    def _gone(self, key: int, number: int, size: int, on_device: bool) -> None:
        self._ids.pop(key, None)
        if on_device:
            self.spans[-1].events[-1].append(Event(number, -size))
        else:
            self.host_live -= size

    def live(self) -> set[int]:
        """The storages that are there now."""
        return set(self._ids.values())

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """The storages of ``tensors`` on the device."""
        found = {self.note(tensor) for tensor in tensors}
        return {number for number in found if number is not None}


class Untraceable(RuntimeError):
    """The step does something that needs data; the message says what."""


@contextmanager
def fake_tensors(recorder: Recorder | None = None) -> Iterator[None]:
    """Tensors made within have no data."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if recorder is not None:
            stack.enter_context(recorder)
        # in this thread: the recorder would not see what autograd's threads for a GPU do
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


def trace_step(blueprint: Blueprint, device: torch.device, num_layers: int | None = None) -> Trace:
    """Record an optimizer step of ``num_layers`` blocks (None: all).  An evaluation holds less than training does.

    Of the micro-batches two are done, where there are as many: from the second one on the gradients are there.
    Raises :class:`Untraceable`, and what building the parts raises.
    """
    recorder = Recorder(device)
    with fake_tensors(recorder):
        built = blueprint.build(device, num_layers)
        recorder.spans = [Span(Phase.held, ["held"], [_merged(recorder.spans)])]
        recorder.host_peak = recorder.host_live
        weights = recorder.numbers([*built.model.parameters(), *built.model.buffers()])
        try:
            state = recorder.numbers(_tensors(built.optimizer.state.values())) - weights
            gradients, saved = _step(recorder, blueprint, built, device)
        except ValueError:
            raise
        except Exception as error:
            raise Untraceable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        vocabulary = {blueprint.vocab_size, built.model.padded_vocab_size}
    categories = {}
    for number, (shape, _) in recorder.shapes.items():
        if number in weights:
            categories[number] = Category.weights
        elif number in state:
            categories[number] = Category.optimizer
        elif number in gradients:
            categories[number] = Category.gradients
        elif len(shape) > 1 and shape[-1] in vocabulary:
            categories[number] = Category.logits
        else:
            categories[number] = Category.activations if number in saved else Category.temporary
    return Trace(recorder.spans, categories, recorder.host_peak)


def _step(recorder: Recorder, blueprint: Blueprint, built: Built, device: torch.device) -> tuple[set[int], set[int]]:
    """A step as the loop does it; the storages of gradients, and of what was kept for a backward pass."""
    precision, clipping = blueprint.precision, blueprint.settings.clipping
    size, length = blueprint.micro_batch_size, blueprint.sequence_length
    parameters = [(name, p) for name, p in built.model.named_parameters() if p.requires_grad]
    batch = torch.zeros((2, blueprint.batch_size, length), dtype=torch.int64, device=device)
    segments = torch.ones((size, length), dtype=torch.int32, device=device) if blueprint.settings.data.packs else None
    gradients: set[int] = set()
    saved: set[int] = set()
    for start in range(0, min(blueprint.batch_size, 2 * size), size):
        inputs, targets = batch[0, start : start + size], batch[1, start : start + size]
        recorder.phase(Phase.forward)
        with precision.autocast():
            part = built.loss_sum(inputs, targets, segments) / blueprint.batch_size
        saved |= recorder.live()
        recorder.phase(Phase.backward)
        precision.scale(part).backward()
        gradients |= recorder.numbers(p.grad for _, p in parameters if p.grad is not None)
        del part
    recorder.phase(Phase.update)
    precision.unscale([p for _, p in parameters])
    clipping(parameters, clipping.start_step)
    found_inf = torch.zeros((), device=device)
    recorder.limit = len(recorder.spans[-1].names) + UPDATE_OPERATIONS
    with suppress(Enough):
        if getattr(built.optimizer, "_step_supports_amp_scaling", False):
            optimizer_step(built.optimizer, found_inf)
        else:
            built.optimizer.step()
    recorder.limit = None
    built.optimizer.zero_grad(set_to_none=True)
    return gradients, saved


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(list(values)) if isinstance(value, Tensor))


def _merged(spans: Sequence[Span]) -> list[Event]:
    """What is left of all the events of ``spans``: the storages that have not gone."""
    live: dict[int, Event] = {}
    for event in (event for span in spans for events in span.events for event in events):
        if event.num_bytes < 0:
            live.pop(event.storage, None)
        else:
            live[event.storage] = event
    return list(live.values())
