"""A trace of one training step on tensors without data: every storage is counted while it lives.

The step is the run's own code on :class:`FakeTensorMode` tensors, which have shapes, types and a device but no
memory.  So everything that a model, an objective or a precision does is traced and not assumed: chunked losses,
recomputation and copies to the host.  The workspace of a kernel while it runs is not traced.

The tensors are on the CPU on every machine, so that a GPU's plan is the same beside the GPU as without one: torch
without CUDA differentiates no tensors on a GPU, nor does it know the attention kernels there.  Code of ours that asks
:func:`llmtrain.base.device.device_type` takes the branch of the device planned for; operations of torch's that keep
more on a CPU are replaced (:class:`GpuOperations`).
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmtrain.optimizer import update
from llmtrain.plan.blueprint import Blueprint
from llmtrain.train.rehearsal import made_up_batch
from llmtrain.train.step import Step

# The operations of an update that are traced.  An update of the parameters one by one takes tens of thousands, all
# alike, and begins with the largest parameter, the embedding.
UPDATE_OPERATIONS = 1000


class Category(IntEnum):
    """The purpose of memory."""

    weights = 0
    gradients = 1
    optimizer = 2
    activations = 3  # kept from the forward for the backward pass, weights cast by autocast included
    logits = 4  # tensors with a row of the vocabulary for each token: logits, their softmax, their gradient
    temporary = 5  # everything else: inputs and results of operations


class Phase(IntEnum):
    """A part of the step."""

    held = 0  # the state between two steps
    forward = 1
    backward = 2
    update = 3  # clipping and the optimizer's step


@dataclass
class Event:
    """The allocation of a storage (bytes above 0) or its release (below)."""

    storage: int
    num_bytes: int


@dataclass
class Span:
    """The operations of one phase: their names, and the allocations and releases of each."""

    phase: Phase
    names: list[str] = field(default_factory=list)
    events: list[list[Event]] = field(default_factory=list)

    def begin(self, name: str) -> None:
        """Begin an operation."""
        self.names.append(name)
        self.events.append([])


@dataclass
class Trace:
    """The trace of an optimizer step."""

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
                row[:] = peak  # memory that an operation frees exists while it runs
            result.append(rows)
        return result


class TraceLimitReached(Exception):
    """A signal that enough operations are recorded: the rest of the phase repeats them."""


class Recorder(TorchDispatchMode):
    """A recorder of every storage on ``device``: its allocation by an operation, and its release."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.spans = [Span(Phase.held, ["held"], [[]])]
        self.shapes: dict[int, tuple[tuple[int, ...], Phase]] = {}  # of the first tensor on a storage, and its phase
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
                self.add(tensor)
        return result

    def phase(self, phase: Phase) -> None:
        """Begin a part of the step."""
        self.spans.append(Span(phase, [f"begin {phase.name}"], [[]]))

    def add(self, tensor: Tensor) -> int:
        """Record the tensor's storage unless it is known; return its number."""
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
        weakref.finalize(storage, self._release, key, number, size, on_device)
        return number

    def _release(self, key: int, number: int, size: int, on_device: bool) -> None:
        self._ids.pop(key, None)
        if on_device:
            self.spans[-1].events[-1].append(Event(number, -size))
        else:
            self.host_live -= size

    def live(self) -> set[int]:
        """The storages that exist now."""
        return set(self._ids.values())

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """The storages of ``tensors`` on the device."""
        return {self.add(tensor) for tensor in tensors}


class TraceError(RuntimeError):
    """An operation of the step needs data; the message names it."""


class StandInMode(FakeTensorMode):
    """Tensors without data that stand for those on another type of device."""

    planned_for: str | None = None  # for device_type


class GpuOperations(TorchFunctionMode):
    """Operations that keep as much for backward on CPU tensors as a GPU's kernels do.

    A CPU keeps the steps of a norm, a mask of dropout in the tensor's type, and of attention with dropout all scores.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.rms_norm, torch.rms_norm):
            return _layer_norm(*args, **kwargs)
        if function in (F.dropout, torch.dropout):
            return _native_dropout(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            return function(*args, **(kwargs | {"dropout_p": 0.0}))
        return function(*args, **kwargs)


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Keep what the fused RMSNorm keeps: its input, and a number for each row (here two)."""
    return F.layer_norm(x, list(shape), weight, None, 1e-5 if eps is None else eps)


def _native_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keep a boolean mask."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


@contextmanager
def fake_tensors(recorder: Recorder | None = None, planned_for: str | None = None) -> Iterator[None]:
    """Make tensors without data within the context; ``planned_for``: the type of device that they stand for."""
    with ExitStack() as stack:
        mode = stack.enter_context(StandInMode(allow_non_fake_inputs=True))
        mode.planned_for = planned_for
        if planned_for == "cuda":
            stack.enter_context(GpuOperations())
        if recorder is not None:
            stack.enter_context(recorder)
        # in this thread: the recorder does not see autograd's threads for a GPU
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


def trace_step(blueprint: Blueprint, num_layers: int | None = None, *, planned_for: str | None = None) -> Trace:
    """Record an optimizer step of ``num_layers`` blocks (None: all).  An evaluation takes less memory than training.

    At most two micro-batches are traced: from the second one on the gradients exist.  ``planned_for``: the type of the
    device that the tensors stand for; None: that of the blueprint's precision, which they are on.  Raises
    :class:`TraceError`, and ValueError as building the parts does.
    """
    device = blueprint.precision.device
    recorder = Recorder(device)
    with fake_tensors(recorder, planned_for):
        phases = PhaseRecorder(recorder)
        step = blueprint.build(num_layers, timer=phases)
        recorder.spans = [Span(Phase.held, ["held"], [_merged(recorder.spans)])]
        recorder.host_peak = recorder.host_live
        weights = recorder.numbers([*step.unit.parameters(), *step.unit.buffers()])
        try:
            state = recorder.numbers(tensors_in(step.optimizer.state.values())) - weights
            _record_step(recorder, phases, blueprint, step, device)
        except ValueError:
            raise
        except Exception as error:
            raise TraceError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
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
    """The timer of a traced step: it begins the recorder's phases, and records which storages hold gradients and which
    are kept for a backward pass."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.weights: list[Tensor] = []
        self.gradients: set[int] = set()
        self.saved: set[int] = set()

    def mark(self, phase: str) -> None:
        """Record the end of ``phase``."""
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
    step.drop_gradients()


def tensors_in(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(list(values)) if isinstance(value, Tensor))


def _merged(spans: Sequence[Span]) -> list[Event]:
    """The allocations in ``spans`` that were not released."""
    live: dict[int, Event] = {}
    for event in (event for span in spans for events in span.events for event in events):
        if event.num_bytes < 0:
            live.pop(event.storage, None)
        else:
            live[event.storage] = event
    return list(live.values())
