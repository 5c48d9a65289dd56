"""Ranks of one job on this machine, for tests: processes with gloo that run functions of a test module together.

``Ranks(2).run(function, argument, …)`` calls ``function(world, argument, …)`` on both ranks and returns their results,
in order of rank.  Arguments and results are what JSON can hold.  The processes stay for the next call, since importing
torch takes seconds: one process imports, and forks the ranks.  After a failure they are ended, and the next call starts
new ones.

    @pytest.fixture(scope="module")
    def two() -> Iterator[Ranks]:
        with Ranks(2) as ranks:
            yield ranks

    def add(world: GlooWorld, number: int) -> float:
        return world.sum(torch.tensor(number + world.rank)).item()

    def test_sum_is_the_same_on_every_rank(two: Ranks) -> None:
        assert two.run(add, 1) == [3, 3]
"""

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

from llmtrain.base.world import World

ROOT = Path(__file__).parents[2]
START_SECONDS, COLLECTIVE_SECONDS = 120, 60
OUTPUT_CHARACTERS = 6000  # of each rank, in the message of a failure
PR_SET_PDEATHSIG = 1


class RankFailed(AssertionError):
    """A rank raised an exception, ended, or took too long."""


class GlooWorld(World):
    """The ranks of a test's job, on gloo and the CPU."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.host = rank, size, "localhost"

    def sum(self, tensor: Any) -> Any:
        import torch.distributed as dist

        dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        import torch

        return bool(self.sum(torch.tensor(int(flag))).item())

    def share(self, value: Any) -> Any:
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = max(int(size) for size in sizes)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(padded, torch.cat([own, own.new_zeros(longest - len(own))]))
        return [json.loads(bytes(part[: int(size)].numpy())) for part, size in zip(padded, sizes, strict=True)]

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier()


class Ranks:
    """``size`` processes that call functions together; a context manager."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._requests: list[IO[bytes]] = []
        self._answers: list[IO[bytes]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 120) -> list[Any]:
        """Call ``function(world, *arguments)`` on every rank; return the results in order.

        The function is found by its name in its module.  Raises RankFailed with the output of all ranks.
        """
        if self._process is None:
            self._start()  # not counted in the time-out
        request = {"module": function.__module__, "name": function.__qualname__, "arguments": arguments}
        results: dict[int, Any] = {}
        try:
            for pipe in self._requests:
                pipe.write(json.dumps(request).encode() + b"\n")
                pipe.flush()
            deadline = time.monotonic() + timeout_seconds
            while len(results) < self.size:
                self._wait(results, deadline, timeout_seconds)
        except BrokenPipeError:
            self._fail("a rank has ended")
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(self.size)]

    def _wait(self, results: dict[int, Any], deadline: float, timeout_seconds: float) -> None:
        """Read the answers that are there, or come next."""
        missing = {self._answers[rank]: rank for rank in range(self.size) if rank not in results}
        ready, _, _ = select.select(list(missing), [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            self._fail(f"no answer of ranks {sorted(missing.values())} after {timeout_seconds:g} s")
        for pipe in ready:
            line = pipe.readline()
            if not line:
                self._fail(f"rank {missing[pipe]} has ended")
            answer = json.loads(line)
            if "error" in answer:
                self._fail(f"rank {missing[pipe]}: {answer['error']}")
            results[missing[pipe]] = answer["result"]

    def output(self) -> str:
        """Return the last lines of every rank."""
        assert self._folder is not None
        parts = []
        for rank in range(self.size):
            path = Path(self._folder.name) / f"rank-{rank}.log"
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "(not started)"
            parts.append(f"--- rank {rank}\n{text[-OUTPUT_CHARACTERS:]}")
        server = Path(self._folder.name) / "server.log"
        return "\n".join([*parts, server.read_text(encoding="utf-8", errors="replace")])

    def _fail(self, reason: str) -> NoReturn:
        time.sleep(0.2)  # the other ranks report, too
        message = f"{reason}\n{self.output()}"
        self.close()
        raise RankFailed(message)

    def _start(self) -> None:
        """Start the ranks; return when all are connected."""
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        folder = Path(self._folder.name)
        requests, answers = ([os.pipe() for _ in range(self.size)] for _ in range(2))
        theirs = [*(read for read, _ in requests), *(write for _, write in answers)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.ranks", str(folder), *map(str, theirs)], cwd=ROOT,
                env=environment, pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        for descriptor in theirs:
            os.close(descriptor)
        self._requests = [os.fdopen(write, "wb") for _, write in requests]
        self._answers = [os.fdopen(read, "rb", buffering=0) for read, _ in answers]
        started: dict[int, Any] = {}
        deadline = time.monotonic() + START_SECONDS
        while len(started) < self.size:
            self._wait(started, deadline, START_SECONDS)

    def close(self) -> None:
        """End the processes."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        for pipe in (*self._requests, *self._answers):
            with suppress(BrokenPipeError):
                pipe.close()
        assert self._folder is not None
        self._folder.cleanup()
        self._process = self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- the processes --------------------------------------------------------------------------------------------------


def serve(folder: Path, descriptors: Sequence[int]) -> int:
    """Import what the ranks need, fork them, and wait for them."""
    import torch.distributed.device_mesh
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import torch.nn.parallel

    import llmtrain.config.assemble  # noqa: F401

    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not to outlive the test
    size = len(descriptors) // 2
    pids = []
    for rank in range(size):
        if (pid := os.fork()) == 0:
            for other in {*descriptors} - {descriptors[rank], descriptors[size + rank]}:
                os.close(other)
            serve_rank(folder, rank, size, descriptors[rank], descriptors[size + rank])
        pids.append(pid)
    for descriptor in descriptors:
        os.close(descriptor)
    for pid in pids:
        os.waitpid(pid, 0)
    return 0


def serve_rank(folder: Path, rank: int, size: int, requests: int, answers: int) -> NoReturn:
    """Answer requests until there are no more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", f"file://{folder / 'store'}", rank=rank, world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )  # fmt: skip
        with os.fdopen(requests, "rb") as lines, os.fdopen(answers, "wb") as results:
            send(results, {"result": "started"})
            for line in lines:
                send(results, call(json.loads(line), GlooWorld(rank, size)))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(0)


def send(results: IO[bytes], answer: dict[str, Any]) -> None:
    sys.stdout.flush()
    results.write(json.dumps(answer).encode() + b"\n")
    results.flush()


def call(request: dict[str, Any], world: World) -> dict[str, Any]:
    """Call the function of ``request``; return its result, or its error, which the log has in full."""
    try:
        function: Any = importlib.import_module(request["module"])
        for part in request["name"].split("."):
            function = getattr(function, part)
        result = function(world, *request["arguments"])
        json.dumps(result)
    except BaseException as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"result": result}


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), [int(text) for text in sys.argv[2:]]))
