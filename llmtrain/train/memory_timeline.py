"""Memory by category during a few profiled steps: from the profiler's events to a picture."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.base.format import size
from llmtrain.base.png import write_png

# Bottom to top; the first three exist when the recording begins, and their sizes are known without it.
EXISTING = ("weights", "optimizer state", "other, from before")
CREATED = ("gradients", "activations", "batch", "temporary")
COLOURS = ("#3b6ea8", "#7a9cc6", "#b9b9b9", "#d1603d", "#e3a857", "#6f9e6e", "#c9a4c4")
MAX_POINTS = 4000  # in a picture; more are thinned out, except the peaks


@dataclass(frozen=True)
class PhaseBoundary:
    """The end of a phase (``"forward"``, …) at ``microseconds`` of the trace's clock."""

    microseconds: float
    phase: str
    gradients: frozenset[int] = field(default_factory=frozenset)  # addresses of the gradients that exist by now


@dataclass(frozen=True)
class Block:
    """Memory from its allocation to its release; ``end`` is None for a block that outlives the recording."""

    address: int
    num_bytes: int
    begin: float  # microseconds
    end: float | None


@dataclass(frozen=True)
class Timeline:
    """Bytes held by each category after each allocation and release."""

    milliseconds: np.ndarray  # (points,), since the recording began
    held: dict[str, np.ndarray]  # category -> (points,): weights, and every other category that is not always 0
    boundaries: list[tuple[float, str]]  # milliseconds, and the phase that ends there

    @property
    def total(self) -> np.ndarray:
        """Bytes of all categories (points,)."""
        return np.sum(list(self.held.values()), axis=0)

    @property
    def peak(self) -> dict[str, int]:
        """Bytes of each category at the point where their sum is largest."""
        point = int(self.total.argmax())
        return {category: int(values[point]) for category, values in self.held.items()}

    @classmethod
    def of(
        cls,
        events: Sequence[dict[str, Any]],
        boundaries: Sequence[PhaseBoundary],
        *,
        is_cuda: bool,
        weights: int,
        state: int,
    ) -> "Timeline":
        """Build the timeline from the ``traceEvents`` of a trace.

        ``weights`` and ``state`` are the bytes of the parameters and of the optimizer's state, which exist all the
        time.  On a GPU the allocator reports the other bytes held before; a CPU's profiler does not know them.
        """
        kind = 1 if is_cuda else 0  # c10::DeviceType
        memory = sorted(
            (event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == kind),
            key=lambda event: event["ts"],
        )
        start = min(
            (event["ts"] for event in [*memory[:1], *({"ts": b.microseconds} for b in boundaries)]), default=0.0
        )
        before = 0
        if is_cuda and memory:
            before = max(memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"] - weights - state, 0)
        blocks, released = _blocks(memory)
        changes = [(when, EXISTING[2], -num_bytes) for when, num_bytes in released] if is_cuda else []
        ends = [boundary.microseconds for boundary in boundaries]
        for block in blocks:
            category = _category(block, boundaries, bisect_right(ends, block.begin))
            changes.append((block.begin, category, block.num_bytes))
            if block.end is not None:
                changes.append((block.end, category, -block.num_bytes))
        changes.sort(key=lambda change: change[0])
        times = np.array([start, *(when for when, _, _ in changes)])
        held = {}
        for category, first in zip((*EXISTING, *CREATED), (weights, state, before, 0, 0, 0, 0), strict=True):
            steps = [first, *(delta if name == category else 0 for _, name, delta in changes)]
            held[category] = np.maximum(np.cumsum(steps, dtype=np.int64), 0)
        marks = [((boundary.microseconds - start) / 1000, boundary.phase) for boundary in boundaries]
        held = {name: values for name, values in held.items() if values.any() or name == EXISTING[0]}
        return cls((times - start) / 1000, held, marks)


def _blocks(memory: Sequence[dict[str, Any]]) -> tuple[list[Block], list[tuple[float, int]]]:
    """Return the blocks allocated during the recording, and (time, bytes) of each release of an earlier block."""
    blocks, released = [], []
    live: dict[int, tuple[float, int]] = {}
    for event in memory:
        address, num_bytes, when = event["args"]["Addr"], event["args"]["Bytes"], event["ts"]
        if num_bytes > 0:
            live[address] = (when, num_bytes)
        elif address in live:
            begin, allocated = live.pop(address)
            blocks.append(Block(address, allocated, begin, when))
        else:
            released.append((when, -num_bytes))
    blocks += [Block(address, num_bytes, begin, None) for address, (begin, num_bytes) in live.items()]
    return blocks, released


def _category(block: Block, boundaries: Sequence[PhaseBoundary], number: int) -> str:
    """Return a block's category: by the phase that made it, which ends at boundary ``number``, and by its lifetime."""
    if number == len(boundaries):
        return "temporary"
    boundary = boundaries[number]
    if block.end is not None and block.end <= boundary.microseconds:
        return "temporary"
    if boundary.phase == "backward" and block.address in boundary.gradients:
        return "gradients"
    return {"forward": "activations", "data": "batch"}.get(boundary.phase, "temporary")


def draw(timeline: Timeline, path: Path, title: str) -> None:
    """Write ``timeline`` to the PNG ``path``."""
    from matplotlib import style  # takes a while to import
    from matplotlib.figure import Figure

    chosen = _thinned(timeline.total)
    x = timeline.milliseconds[chosen]
    with style.context(["default", {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}]):
        figure = Figure(figsize=(12, 5), layout="constrained")
        axes = figure.subplots()
        below = np.zeros(len(chosen))
        peak = timeline.peak
        for category, colour in zip((*EXISTING, *CREATED), COLOURS, strict=True):
            if category in timeline.held:
                above = below + timeline.held[category][chosen]
                label = f"{category}, {size(peak[category])}"
                axes.fill_between(x, below, above, step="post", color=colour, linewidth=0, label=label)
                below = above
        top = float(below.max()) or 1.0
        axes.set_ylim(0, 1.12 * top)
        axes.set_xlim(0, max(float(x[-1]), 1e-3))
        edges = [0.0, *(when for when, _ in timeline.boundaries)]
        for (end, phase), begin in zip(timeline.boundaries, edges, strict=False):
            axes.axvline(end, color="#888888", linewidth=0.6)
            if end - begin > 0.06 * edges[-1]:  # else the name does not fit
                axes.text((begin + end) / 2, 1.06 * top, phase, ha="center", fontsize=8, color="#555555")
        axes.yaxis.set_major_formatter(lambda value, _: size(value))
        axes.set_xlabel("milliseconds")
        axes.set_title(title, loc="left", weight="bold", parse_math=False)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1), title=f"at the peak, {size(top)}"
        )
        write_png(figure, path)


def _thinned(total: np.ndarray) -> np.ndarray:
    """Choose about MAX_POINTS points of ``total``, the highest of each stretch among them; return their indices."""
    if len(total) <= MAX_POINTS:
        return np.arange(len(total))
    stretches = np.array_split(np.arange(len(total)), MAX_POINTS // 2)
    return np.array(sorted({int(i) for s in stretches for i in (s[0], s[total[s].argmax()])} | {len(total) - 1}))
