"""Ranks of one job on this machine, for tests: processes with gloo that run functions of a test module together.

``Ranks(2).run(function, argument, …)`` calls ``function(world, argument, …)`` on both ranks and returns their results,
in order of rank.  Arguments and results are what JSON can hold.  Importing torch takes seconds: one process imports,
and forks new ranks for each call, so that no group of processes, with its threads, is left from the one before.  After
a failure that process is ended, and the next call starts another.

    @pytest.fixture(scope="module")
    def two() -> Iterator[Ranks]:
        with Ranks(2) as ranks:
            yield ranks

    def add(world: GlooWorld, number: int) -> float:
        return world.sum(torch.tensor(number + world.rank)).item()

    def test_sum_is_the_same_on_every_rank(two: Ranks) -> None:
        assert two.run(add, 1) == [3, 3]
"""

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
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from llmtrain.base.world import World
from tests.helpers.processes import die_with_parent

ROOT = Path(__file__).parents[2]
START_SECONDS, COLLECTIVE_SECONDS = 120, 60
OUTPUT_CHARACTERS = 6000  # of each rank, in the message of a failure


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

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 120) -> list[Any]:
        """Call ``function(world, *arguments)`` on every rank; return the results in order.

        The function is found by its name in its module.  Raises RankFailed with the output of all ranks.
        """
        request = {"module": function.__module__, "name": function.__qualname__, "arguments": arguments}
        results: dict[int, Any] = {}
        try:
            if self._process is None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            if self._answer(START_SECONDS) is None:  # imported, and forked: not counted in the time-out
                self._fail(f"the ranks have not started in {START_SECONDS} s")
            deadline = time.monotonic() + timeout_seconds
            while len(results) < self.size:
                answer = self._answer(deadline - time.monotonic())
                if answer is None:
                    missing = [rank for rank in range(self.size) if rank not in results]
                    self._fail(f"no answer of ranks {missing} in {timeout_seconds:g} s")
                if "result" not in answer:
                    self._fail(f"rank {answer['rank']}: {answer['error']}")
                results[answer["rank"]] = answer["result"]
        except BrokenPipeError:
            self._fail("the process that forks the ranks has ended")
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(self.size)]

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """Read the next line of the server; None if there is none in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(seconds, 0))
        if not ready:
            return None
        line = self._process.stdout.readline()
        if not line:
            self._fail("the process that forks the ranks has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self, reason: str) -> NoReturn:
        time.sleep(0.2)  # the other ranks report, too
        message = f"{reason}\n{self.output()}"
        self.close()
        raise RankFailed(message)

    def output(self) -> str:
        """Return the last lines of every rank."""
        assert self._folder is not None
        names = [*(f"rank-{rank}.log" for rank in range(self.size)), "server.log"]
        paths = {name: Path(self._folder.name) / name for name in names}
        texts = {name: path.read_text(errors="replace") if path.exists() else "" for name, path in paths.items()}
        return "\n".join(f"--- {name}\n{text[-OUTPUT_CHARACTERS:]}" for name, text in texts.items())

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (Path(self._folder.name) / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.ranks", self._folder.name, str(self.size)], cwd=ROOT,
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        """End the processes."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)  # close its pipes, and wait
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


def serve(folder: Path, size: int) -> None:
    """Import what the ranks need; fork ``size`` ranks for each request, and pass on their answers as they end."""
    import torch._dynamo  # by the first optimizer
    import torch.distributed.device_mesh
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import torch.nn.parallel

    import llmtrain.config.assemble  # noqa: F401
    from llmtrain.optimizer import muon

    muon.has_native_bf16 = lambda device: False  # bf16 would round away what the tests compare
    torch.set_num_threads(1)
    die_with_parent()
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        with suppress(Exception):  # the ranks will report it
            importlib.import_module(request["module"])
        ranks = {}
        for rank in range(size):
            if (pid := os.fork()) == 0:
                serve_rank(folder, number, rank, size, request)
            ranks[pid] = rank
        send({})
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            answer = folder / f"answer-{number}-{rank}"
            ended = {"error": f"has ended with status {os.waitstatus_to_exitcode(status)}"}
            send({"rank": rank, **(json.loads(answer.read_text()) if answer.exists() else ended)})


def send(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def serve_rank(folder: Path, number: int, rank: int, size: int, request: dict[str, Any]) -> NoReturn:
    """Be one rank of the request with this ``number``; write the answer and exit."""
    die_with_parent()
    output = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", f"file://{folder / f'store-{number}'}", rank=rank, world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )  # fmt: skip
        dist.barrier()  # all are connected before one can end
        answer = call(request, GlooWorld(rank, size))
        sys.stdout.flush()
        part = folder / f"answer-{number}-{rank}.part"
        part.write_text(json.dumps(answer))
        part.rename(part.with_suffix(""))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


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
    serve(Path(sys.argv[1]), int(sys.argv[2]))
