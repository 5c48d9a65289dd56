"""Memory of a run by category, from a traced step.

    memory = estimate(Blueprint.of(run, vocab_size, precision, batch_size), gpu=False)
    memory.peak  # bytes, as ``memory_bytes`` in the metrics

Of a model with many equal blocks two small ones are traced and the rest is extrapolated.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.kernels.linear_cross_entropy import as_on
from llmtrain.plan.blueprint import Blueprint, outline
from llmtrain.plan.extrapolation import IrregularBlocks, extrapolate
from llmtrain.plan.heap import heap_peak
from llmtrain.plan.trace import Category, Phase, Trace, Untraceable, trace_step

__all__ = ["Category", "Memory", "Phase", "Untraceable", "at_micro_batch", "estimate"]

# Resident beside the heap of tensors: Python, torch with all that it imports on the way, buffers of oneDNN and OpenMP.
# Measured with torch 2.13 on Linux: `model=tiny tokenizer=byte` has 337 MB once it is assembled, 365 MB with GPT-2's
# tokenizer.
CPU_LIBRARIES = 365_000_000
# What the kernels take for themselves while they run: packed weights, copies in another order.  Measured: 45 to 225 MB
# over the simulated heap from `model=laptop` to `model=gpt124m`; the latter in fp32 stays below it.
CPU_WORKSPACE = 65_000_000
CPU_LEAST_HEAP = 90_000_000  # the matrices that the arithmetic's speed is measured with when a run starts
# cuBLAS' workspace, which comes from torch's allocator: 32 MiB on Hopper, 8 MiB before.
GPU_WORKSPACE = 33_554_432
# CUDA's context and its kernels; outside of torch's allocator and of ``memory_bytes``, and yet on the device.
GPU_CONTEXT = 500_000_000
# Of what is live: blocks of the allocator's segments that are not whole.
GPU_SLACK = 0.03


@dataclass(frozen=True)
class Memory:
    """What a run holds when it holds the most, in bytes."""

    parts: Mapping[str, int]  # by category; on a CPU also "allocator", "libraries", "checkpoint copy"
    phase: Phase  # of the step, when that is
    by_phase: Mapping[Phase, int]  # the most in each
    host: int  # on the host, where the device is a GPU: the checkpoint's copy, what waits there for backward
    outside: int  # on the device, but not torch's: CUDA's context, what the allocator cannot use

    @property
    def peak(self) -> int:
        """As ``memory_bytes`` in the metrics: allocated on a GPU, resident on a CPU."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What the device has to have free."""
        return self.peak + self.outside


def estimate(blueprint: Blueprint, *, gpu: bool, copied: bool = False) -> Memory:
    """The memory of a run on a GPU or on a CPU.

    ``copied``: whether a save copies weights and optimizer state to host memory while the run goes on.  Raises
    :class:`Untraceable` where a step cannot be done without data, and ValueError as building the parts does.
    """
    with as_on("cuda" if gpu else "cpu"):
        phases, host, heap_over_live = _trace(blueprint, gpu)
    by_phase: dict[Phase, int] = {}
    best, at, where = -1, np.zeros(len(Category), dtype=np.int64), Phase.held
    for phase, rows in phases:
        row = rows[rows.sum(axis=1).argmax()]
        total = int(row.sum())
        by_phase[phase] = max(by_phase.get(phase, 0), total)
        if total > best:
            best, at, where = total, row, phase
    parts = {category.name: int(at[category]) for category in Category}
    copy = 0
    if copied:
        weights = parts["weights"]
        if blueprint.settings.lora.adapts:  # those that are trained
            model = outline(blueprint.settings, blueprint.vocab_size, blueprint.labels)
            weights = sum(tensor.nbytes for tensor in saved_tensors(model).values())
        copy = weights + parts["optimizer"]
    if gpu:
        parts["libraries"] = GPU_WORKSPACE
        outside = GPU_CONTEXT + round(GPU_SLACK * best)
        return Memory(parts, where, by_phase, host + copy, outside)
    parts["allocator"] = max(round(best * heap_over_live) + CPU_WORKSPACE, CPU_LEAST_HEAP) - best
    parts["libraries"] = CPU_LIBRARIES
    if copy:
        parts["checkpoint copy"] = copy
    return Memory(parts, where, by_phase, 0, 0)


def at_micro_batch(blueprint: Blueprint, size: int) -> Blueprint:
    """The same run with micro-batches of ``size`` sequences."""
    return dataclasses.replace(blueprint, micro_batch=size)


Phases = list[tuple[Phase, np.ndarray]]  # live bytes, (operations, categories)


def _trace(blueprint: Blueprint, gpu: bool) -> tuple[Phases, int, float]:
    """Live bytes of each phase, the most bytes on a GPU's host, and a CPU's heap over what is live."""
    device, layers = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu"), blueprint.num_layers
    if layers is not None:
        for period in (blueprint.period, 2 * blueprint.period):
            if 3 * period >= layers:  # as much work as the whole
                break
            try:
                small, large = (trace_step(blueprint, device, number) for number in (period, 2 * period))
                return *extrapolate(small, large, (period, 2 * period), layers), _heap_over_live(large)
            except (IrregularBlocks, ValueError):  # a rule of the optimizer, say, that names a block
                continue
    trace = trace_step(blueprint, device)
    phases = [(span.phase, rows) for span, rows in zip(trace.spans, trace.timeline(), strict=True)]
    return phases, trace.host_bytes, _heap_over_live(trace)


def _heap_over_live(trace: Trace) -> float:
    live = max(int(rows.sum(axis=1).max()) for rows in trace.timeline())
    return heap_peak(trace) / live
