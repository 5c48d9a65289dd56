"""The parts that the fuzzers share: their arguments, and their cases in several processes at once."""

import argparse
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

PROGRESS = 250  # cases between two lines about how far it is
STATUSES = (0, 1, 2, 75)  # the exit statuses of the program

Input = TypeVar("Input")
Result = TypeVar("Result")


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """The parser of a fuzzer's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases to run again")
    return parser


def in_parallel(
    attempts: Callable[[Sequence[Input]], Iterable[Result]], inputs: Sequence[Input], workers: int
) -> Iterator[Result]:
    """Yield the results of ``attempts`` on ``inputs``, shared among ``workers`` processes; they come in any order."""
    if workers == 1:
        yield from attempts(inputs)
        return
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[Result | None] = context.Queue()

    def work(part: Sequence[Input]) -> None:
        for result in attempts(part):
            results.put(result)
        results.put(None)

    processes = [context.Process(target=work, args=(inputs[part::workers],)) for part in range(workers)]
    for process in processes:
        process.start()
    running = workers
    while running:
        result = results.get()
        running -= result is None
        if result is not None:
            yield result
    for process in processes:
        process.join()
