"""A parallel ``map`` on threads, with results in order and in bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")
MAX_THREADS = 32  # one thread reads for all, and each holds a few MB


def map_in_order(function: Callable[[In], Out], jobs: Iterable[In], num_threads: int | None = None) -> Iterator[Out]:
    """Map ``function`` over ``jobs`` on threads (None: one per core).  At most two jobs per thread are in memory."""
    num_threads = num_threads or min(getattr(os, "process_cpu_count", os.cpu_count)() or 1, MAX_THREADS)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")
    waiting: deque[Future[Out]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) >= 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
