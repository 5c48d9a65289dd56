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

from llmtrain.optimizer import update
from llmtrain.plan.blueprint import Blueprint
from llmtrain.train.rehearsal import made_up_batch
from llmtrain.train.step import Step

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


class TraceLimitReached(Exception):
    """The operations recorded so far are enough: the rest of the phase repeats them."""


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
            raise TraceLimitReached
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


def trace_step(
    blueprint: Blueprint, device: torch.device, num_layers: int | None = None, *, planned_for: str | None = None
) -> Trace:
    """Record an optimizer step of ``num_layers`` blocks (None: all).  An evaluation holds less than training does.

    Of the micro-batches two are done, where there are as many: from the second one on the gradients are there.
    ``planned_for``: the type of device whose memory it is for, if not that of ``device``.  Raises
    :class:`Untraceable`, and what building the parts raises.
    """
    recorder = Recorder(device)
    with fake_tensors(recorder):
        phases = PhaseRecorder(recorder)
        step = blueprint.build(device, num_layers, planned_for=planned_for or device.type, timer=phases)
        recorder.spans = [Span(Phase.held, ["held"], [_merged(recorder.spans)])]
        recorder.host_peak = recorder.host_live
        weights = recorder.numbers([*step.unit.parameters(), *step.unit.buffers()])
        try:
            state = recorder.numbers(_tensors(step.optimizer.state.values())) - weights
            _record_step(recorder, phases, blueprint, step, device)
        except ValueError:
            raise
        except Exception as error:
            raise Untraceable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        vocabulary = {blueprint.vocab_size, step.unit.model.padded_vocab_size}
    categories = {}
    for number, (shape, _) in recorder.shapes.items():
        if number in weights:
            categories[number] = Category.weights
        elif number in state:
            categories[number] = Category.optimizer
        elif number in phases.gradients:
            categories[number] = Category.gradients
        elif len(shape) > 1 and shape[-1] in vocabulary:
            categories[number] = Category.logits
        else:
            categories[number] = Category.activations if number in phases.saved else Category.temporary
    return Trace(recorder.spans, categories, recorder.host_peak)


class PhaseRecorder:
    """The timer of a traced step: begins the recorder's phases, and notes the storages of gradients and of what was
    kept for a backward pass."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.weights: list[Tensor] = []
        self.gradients: set[int] = set()
        self.saved: set[int] = set()

    def mark(self, phase: str) -> None:
        """``phase`` has ended."""
        if phase == "forward":
            self.saved |= self.recorder.live()
            self.recorder.phase(Phase.backward)
        elif phase == "backward":
            gradients = (weight.grad for weight in self.weights)
            self.gradients |= self.recorder.numbers(gradient for gradient in gradients if gradient is not None)
            self.recorder.phase(Phase.forward)


def _record_step(
    recorder: Recorder, phases: PhaseRecorder, blueprint: Blueprint, step: Step, device: torch.device
) -> None:
    settings, clipping = blueprint.settings, blueprint.settings.clipping
    phases.weights = [weight for _, weight in step.weights]
    batch = made_up_batch(
        settings.objective, blueprint.batch_size, blueprint.sequence_length, is_packed=settings.data.packs
    ).map(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device))
    recorder.phase(Phase.forward)
    step.accumulate(batch.rows(0, 2 * step.micro_batch_size), step.micro_batch_size)
    recorder.phase(Phase.update)
    step.precision.unscale([weight for _, weight in step.weights])
    clipping(step.weights, clipping.start_step)
    found_inf = torch.zeros((), device=device)
    recorder.limit = len(recorder.spans[-1].names) + UPDATE_OPERATIONS
    with suppress(TraceLimitReached):
        if getattr(step.optimizer, "_step_supports_amp_scaling", False):
            update(step.optimizer, found_inf)
        else:
            step.optimizer.step()
    recorder.limit = None
    step.optimizer.zero_grad(set_to_none=True)


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
