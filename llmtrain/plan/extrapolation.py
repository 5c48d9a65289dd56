"""Extrapolation from the traces of two small models to the memory of a deep one with equal blocks.

The two traces are the same list of operations, except that the larger one repeats a stretch more often.  Operations are
matched by their distance from the start of their phase, or from its end; the live memory at each of them then grows by
the same amount with every further block.
"""

from collections.abc import Sequence

import numpy as np

from llmtrain.plan.trace import Phase, Trace


class IrregularBlocks(Exception):
    """Two traces that do not differ by equal blocks."""


def extrapolate(
    small: Trace, large: Trace, blocks: tuple[int, int], to: int
) -> tuple[list[tuple[Phase, np.ndarray]], int]:
    """Return the live bytes ``(operations, categories)`` of each phase with ``to`` blocks, and the host's peak.

    Operations of the middle blocks are left out: live memory grows or shrinks steadily from the first to the last
    block, so that the peak is at one of them.  Raises :class:`IrregularBlocks`.
    """
    factor = (to - blocks[0]) / (blocks[1] - blocks[0])
    phases = []
    if len(small.spans) != len(large.spans):
        raise IrregularBlocks
    for span, bigger, rows, more in zip(small.spans, large.spans, small.timeline(), large.timeline(), strict=True):
        if span.phase in (Phase.forward, Phase.backward):
            prefix, extra = aligned(span.names, bigger.names)
            counterpart = np.concatenate([more[:prefix], more[prefix + extra :]])
        else:  # passes over the parameters: only their peaks are compared
            rows, counterpart = (part[part.sum(axis=1).argmax()][None] for part in (rows, more))
        phases.append((span.phase, np.rint(rows + factor * (counterpart - rows)).astype(np.int64)))
    host = small.host_bytes + factor * (large.host_bytes - small.host_bytes)
    return phases, round(host)


def aligned(short: Sequence[str], long: Sequence[str]) -> tuple[int, int]:
    """Return the operations of ``short`` to match from the start, and the number that ``long`` has more.

    Raises :class:`IrregularBlocks` unless ``long`` is ``short`` with one stretch of it repeated.
    """
    extra = len(long) - len(short)
    if extra < 0:
        raise IrregularBlocks
    from_start = _common(short, long)
    from_end = _common(short[::-1], long[::-1])
    if from_start + from_end < len(short):
        raise IrregularBlocks
    first = len(short) - from_end  # the earliest place where the stretch can be inserted
    if extra and long[first : first + extra] != long[first + extra : first + 2 * extra]:
        raise IrregularBlocks
    return (first + from_start) // 2, extra


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
