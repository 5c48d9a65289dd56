"""The memory of a run by category, from a traced step.

    memory = estimate(Blueprint(run, vocab_size, precision, batch_size), gpu=False)
    memory.peak  # bytes, as ``memory_bytes`` in the metrics

For a model of many equal blocks, two small models are traced and the memory is extrapolated.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.checkpoint.snapshot import Layout
from llmtrain.config.assemble import outline
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.extrapolation import IrregularBlocks, extrapolate
from llmtrain.plan.trace import Category, Phase, TraceError, trace_step

__all__ = ["Category", "Memory", "Phase", "TraceError", "at_micro_batch", "estimate"]

# Memory beside the heap of tensors: Python, torch and its imports, buffers of oneDNN and OpenMP.  Measured with torch
# 2.13 on Linux: `model=tiny tokenizer=byte` has 337 MB once it is assembled, 365 MB with GPT-2's tokenizer.
CPU_LIBRARIES = 365_000_000
# Holes of the heap, as a share of the live bytes, and the workspace of kernels: packed weights, reordered copies.  From
# `model=laptop_gpt2` to `model=gpt355m` these two are within 10% of the measured peak; so is a simulation of malloc.
CPU_HOLES = 0.08
CPU_WORKSPACE = 65_000_000
CPU_LEAST_HEAP = 90_000_000  # the matrices that measure the speed of the arithmetic when a run starts
# cuBLAS' workspace, which comes from torch's allocator: 32 MiB on Hopper, 8 MiB before.
GPU_WORKSPACE = 33_554_432
# CUDA's context and its kernels: on the device, but outside of torch's allocator and of ``memory_bytes``.
GPU_CONTEXT = 500_000_000
# Fragmentation of the allocator's segments, as a share of the live bytes.
GPU_SLACK = 0.03


@dataclass(frozen=True)
class Memory:
    """The memory of a run at its peak, in bytes."""

    parts: Mapping[str, int]  # by category; on a CPU also "allocator", "libraries", "checkpoint copy"
    phase: Phase  # of the step, at the peak
    by_phase: Mapping[Phase, int]  # the peak of each
    host: int  # on the host of a GPU: the checkpoint's copy, and tensors offloaded until the backward pass
    outside: int  # on the device beside torch's tensors: CUDA's context, fragmentation

    @property
    def peak(self) -> int:
        """Return the peak as ``memory_bytes`` of the metrics counts it: allocated on a GPU, resident on a CPU."""
        return sum(self.parts.values())

    @property
    def whole(self) -> dict[str, int]:
        """Everything that the device must have free, by part."""
        return {**self.parts, "CUDA context, gaps": self.outside}

    @property
    def needed(self) -> int:
        """Return the bytes that the device must have free."""
        return self.peak + self.outside


def estimate(blueprint: Blueprint, *, gpu: bool, copied: bool = False) -> Memory:
    """Estimate the memory of a run on a GPU or on a CPU.

    ``copied``: a save copies weights and optimizer state to host memory while training continues.  Raises
    ``TraceError`` where a step needs real data, and ValueError as building the parts does.
    """
    phases, host = _trace(blueprint, gpu)
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
    if copied:  # with adapters of the trained weights alone, and without the padding of the vocabulary
        unit = outline(blueprint.settings, blueprint.vocab_size, blueprint.labels)
        copy = Layout.of(saved_tensors(unit)).num_bytes + parts["optimizer"]
    if gpu:
        parts["libraries"] = GPU_WORKSPACE
        outside = GPU_CONTEXT + round(GPU_SLACK * best)
        return Memory(parts, where, by_phase, host + copy, outside)
    parts["allocator"] = max(round(best * (1 + CPU_HOLES)) + CPU_WORKSPACE, CPU_LEAST_HEAP) - best
    parts["libraries"] = CPU_LIBRARIES
    if copy:
        parts["checkpoint copy"] = copy
    return Memory(parts, where, by_phase, 0, 0)


def at_micro_batch(blueprint: Blueprint, size: int) -> Blueprint:
    """Return the same run with micro-batches of ``size`` sequences."""
    return dataclasses.replace(blueprint, micro_batch=size)


Phases = list[tuple[Phase, np.ndarray]]  # live bytes, (operations, categories)


def _trace(blueprint: Blueprint, gpu: bool) -> tuple[Phases, int]:
    """Return the live bytes of each phase, and the peak on the host of a GPU."""
    layers, kind = blueprint.num_layers, "cuda" if gpu else "cpu"
    # Of tensors that wait on the host the last few are still on the device: a small model has no others.
    offloads = getattr(blueprint.settings.activation_checkpointing, "offload", False)
    if layers is not None and not offloads:
        for period in (blueprint.period, 2 * blueprint.period):
            if 3 * period >= layers:  # as much work as the whole model
                break
            try:
                small, large = (trace_step(blueprint, number, planned_for=kind) for number in (period, 2 * period))
                return extrapolate(small, large, (period, 2 * period), layers)
            except (IrregularBlocks, ValueError):  # such as a rule of the optimizer that names a block
                continue
    trace = trace_step(blueprint, planned_for=kind)
    phases = [(span.phase, rows) for span, rows in zip(trace.spans, trace.timeline(), strict=True)]
    return phases, trace.host_bytes
