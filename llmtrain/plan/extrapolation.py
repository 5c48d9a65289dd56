"""From the traces of two small models to the memory of a deep one, whose blocks are alike.

Two traces that differ in a number of equal blocks are the same list of operations but for a stretch that one of them
has more often.  Each operation is told by its distance from the start of its phase, or from the end; what is live while
it runs then grows by the same amount with every further block.
"""

from collections.abc import Sequence

import numpy as np

from llmtrain.plan.trace import Phase, Trace


class Irregular(Exception):
    """The blocks are not alike."""


def extrapolate(
    small: Trace, large: Trace, blocks: tuple[int, int], to: int
) -> tuple[list[tuple[Phase, np.ndarray]], int]:
    """Live bytes ``(operations, categories)`` of each phase with ``to`` blocks, and the most bytes on the host.

    Operations of blocks in the middle are left out: what is live grows or shrinks steadily from the first to the last
    block, so that the most is at one of the two.  Raises :class:`Irregular`.
    """
    factor = (to - blocks[0]) / (blocks[1] - blocks[0])
    phases = []
    if len(small.spans) != len(large.spans):
        raise Irregular
    for span, bigger, rows, more in zip(small.spans, large.spans, small.timeline(), large.timeline(), strict=True):
        if span.phase in (Phase.forward, Phase.backward):
            prefix, extra = aligned(span.names, bigger.names)
            counterpart = np.concatenate([more[:prefix], more[prefix + extra :]])
        else:  # several passes over the parameters, none of which goes up and down: the most in each is compared
            rows, counterpart = (part[part.sum(axis=1).argmax()][None] for part in (rows, more))
        phases.append((span.phase, np.rint(rows + factor * (counterpart - rows)).astype(np.int64)))
    host = small.host_bytes + factor * (large.host_bytes - small.host_bytes)
    return phases, round(host)


def aligned(short: Sequence[str], long: Sequence[str]) -> tuple[int, int]:
    """How many operations of ``short`` are counted from the start, and how many ``long`` has more.

    Raises :class:`Irregular` unless ``long`` is ``short`` with one stretch of it repeated.
    """
    extra = len(long) - len(short)
    if extra < 0:
        raise Irregular
    from_start = _common(short, long)
    from_end = _common(short[::-1], long[::-1])
    if from_start + from_end < len(short):
        raise Irregular
    first = len(short) - from_end  # the earliest place where the stretch can have been put in
    if extra and long[first : first + extra] != long[first + extra : first + 2 * extra]:
        raise Irregular
    return (first + from_start) // 2, extra


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
