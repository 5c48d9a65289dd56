"""Worlds of ranks without a process group: threads of one process, or processes on sockets."""

import json
import socket
import threading
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmtrain.base.world import World

T = TypeVar("T")


class GatheringWorld(World):
    """Every agreement by :meth:`exchange`, the texts of all ranks on each."""

    def __init__(self, rank: int, size: int, host: str = "") -> None:
        self.rank, self.size, self.host = rank, size, host

    @abstractmethod
    def exchange(self, text: str) -> list[str]: ...

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self.exchange(json.dumps(value))]

    def sum(self, tensor: Tensor) -> Tensor:
        total = sum(torch.tensor(values, dtype=tensor.dtype) for values in self.gather(tensor.tolist()))
        assert isinstance(total, Tensor)
        return tensor.copy_(total)

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def share(self, value: Any) -> Any:
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.gather(None)


class ThreadWorld(GatheringWorld):
    """A rank that is a thread."""

    def __init__(self, rank: int, texts: list[str], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(texts))
        self._texts, self._barrier = texts, barrier

    @classmethod
    def of(cls, size: int) -> "list[ThreadWorld]":
        """The worlds of so many ranks; a rank that does not come to an agreement within 30 s breaks it for all."""
        texts, barrier = [""] * size, threading.Barrier(size, timeout=30)
        return [cls(rank, texts, barrier) for rank in range(size)]

    def exchange(self, text: str) -> list[str]:
        self._texts[self.rank] = text
        self._barrier.wait()
        texts = list(self._texts)
        self._barrier.wait()  # nobody writes the next text before all have read
        return texts


class SocketWorld(GatheringWorld):
    """A rank that is a process; rank 0 has a socket to each of the others, and they one to it.

    The end of a process is a ConnectionError in those that wait for it.
    """

    def __init__(self, rank: int, size: int, sockets: list[socket.socket]) -> None:
        super().__init__(rank, size)
        self._files = [(each.makefile("r"), each.makefile("w")) for each in sockets]

    def exchange(self, text: str) -> list[str]:
        if self.rank == 0:
            texts = [text, *(self._read(source) for source, _ in self._files)]
            for _, target in self._files:
                self._write(target, json.dumps(texts))
            return texts
        ((source, target),) = self._files
        self._write(target, text)
        answer = json.loads(self._read(source))
        assert isinstance(answer, list)
        return answer

    def _read(self, source: Any) -> str:
        if not (line := source.readline()).endswith("\n"):
            raise ConnectionError("connection closed by peer")
        return str(line)

    def _write(self, target: Any, text: str) -> None:
        target.write(text + "\n")
        target.flush()


def on_ranks(size: int, work: Callable[[World], T]) -> list[T]:
    """Call ``work(world)`` on so many ranks, threads of this process, at once; return their results."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, ThreadWorld.of(size)))
