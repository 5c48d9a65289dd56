"""What a CPU run's heap grows to: more than is ever live, since a freed block is not always of use for the next one."""

from bisect import bisect_left, insort

from llmtrain.plan.trace import Trace

ALIGNMENT = 64  # bytes, of torch's tensors
STEPS = 3  # simulated; in the first one the order of blocks is not yet what it will be


class Heap:
    """malloc as ``runtime`` sets it up: one heap that never shrinks, the best fit, neighbours merged at once.

    glibc 2.36, ``_int_memalign``: for an aligned block one larger by the alignment is cut, and both ends given back.
    """

    def __init__(self) -> None:
        self.top = 0  # end of the last block in use
        self.peak = 0  # as far as anything has been written to
        self._free: dict[int, int] = {}  # begin -> size
        self._begins: dict[int, int] = {}  # end -> begin
        self._sizes: list[tuple[int, int]] = []  # (size, begin), sorted
        self._blocks: dict[object, tuple[int, int]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._blocks

    def allocate(self, key: object, num_bytes: int) -> None:
        """Take a block, to be given back under ``key``."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        wanted = size + ALIGNMENT
        place = bisect_left(self._sizes, (wanted, 0))
        if place < len(self._sizes):
            found, begin = self._sizes[place]
            self._remove(begin)
        else:
            found, begin, self.top = wanted, self.top, self.top + wanted
        start = -(-begin // ALIGNMENT) * ALIGNMENT
        self._blocks[key] = start, size
        self._give_back(begin, start - begin)
        self._give_back(start + size, begin + found - start - size)
        self.peak = max(self.peak, start + size)

    def release(self, key: object) -> None:
        """Give a block back."""
        self._give_back(*self._blocks.pop(key))

    def release_all(self, step: int) -> None:
        """Give back what is left of a step's blocks."""
        for key in [key for key in self._blocks if isinstance(key, tuple) and key[0] == step]:
            self.release(key)

    def _give_back(self, begin: int, size: int) -> None:
        if size <= 0:
            return
        if begin in self._begins:
            before = self._begins[begin]
            size += self._remove(before)
            begin = before
        if begin + size in self._free:
            size += self._remove(begin + size)
        if begin + size == self.top:
            self.top = begin
            return
        self._free[begin] = size
        self._begins[begin + size] = begin
        insort(self._sizes, (size, begin))

    def _remove(self, begin: int) -> int:
        size = self._free.pop(begin)
        del self._begins[begin + size]
        self._sizes.pop(bisect_left(self._sizes, (size, begin)))
        return size


def heap_peak(trace: Trace) -> int:
    """Bytes that the heap has grown to after a few steps as in ``trace``."""
    heap = Heap()
    for event in trace.spans[0].events[0]:
        heap.allocate(event.storage, event.num_bytes)
    for step in range(STEPS):
        for event in (event for span in trace.spans[1:] for events in span.events for event in events):
            held = event.storage in heap
            key: object = event.storage if held else (step, event.storage)
            if event.num_bytes > 0:
                heap.allocate(key, event.num_bytes)
            elif not held and key in heap:  # what was held when the step began stays
                heap.release(key)
        heap.release_all(step)
    return heap.peak
