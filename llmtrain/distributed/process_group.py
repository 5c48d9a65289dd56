"""The world of a run on torch.distributed: gloo between the hosts' processors, NCCL between GPUs."""

import contextlib
import datetime
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmtrain.base.streams import write_to_stderr
from llmtrain.base.world import World
from llmtrain.distributed.heartbeat import Heartbeat
from llmtrain.distributed.options import Mesh
from llmtrain.distributed.phases import Phase
from llmtrain.distributed.rank_exit import redirect_output
from llmtrain.distributed.supervision import Supervision

LATER_SECONDS = 120.0  # than the heartbeat's time-out: that one names the rank which the others wait for


class ProcessGroup(World):
    """The ranks that a launcher has started.

    Values of the host are sent as JSON, never pickled, over gloo: NCCL would wait for the device.
    """

    def __init__(
        self, host_group: dist.ProcessGroup, timeout: datetime.timedelta, heartbeat: Heartbeat, supervision: Supervision
    ) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.host = socket.gethostname()
        self.local_size = 1
        self.heartbeat, self.supervision = heartbeat, supervision
        self.record_run_directory: Callable[[Path], Any] = lambda _: None  # for a start that follows
        self._host_group, self._timeout = host_group, timeout

    @classmethod
    def open(
        cls, device: torch.device, timeout_seconds: float, heartbeat: Heartbeat, supervision: Supervision,
        store: Any = None,
    ) -> "ProcessGroup":  # fmt: skip
        """Join the ranks by the variables that torchrun sets: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        With a ``store`` they meet there, not at the address.
        """
        timeout = datetime.timedelta(seconds=timeout_seconds + LATER_SECONDS)
        place = {} if store is None else {"store": store, "rank": heartbeat.rank, "world_size": heartbeat.size}
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device, **place)
        else:
            dist.init_process_group("gloo", timeout=timeout, **place)
        heartbeat.collectives = count_collectives
        return cls(dist.new_group(backend="gloo", timeout=timeout), timeout, heartbeat, supervision)

    def separate(self) -> "ProcessGroup":
        """The same ranks with a connection of its own, for another thread, whose calls come in another order."""
        group = dist.new_group(backend="gloo", timeout=self._timeout)
        return ProcessGroup(group, self._timeout, self.heartbeat, self.supervision)

    def mesh(self, degrees: Mesh, device: torch.device) -> DeviceMesh:
        """The mesh of all ranks, with the dimensions ``replicate`` and ``shard``."""
        sizes = degrees.degrees
        return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def mark(self, phase: str, step: int) -> None:
        self.heartbeat.mark(Phase[phase], step)

    def begin(self, run_dir: Path) -> None:
        self.heartbeat.run_dir = run_dir
        if self.is_first:
            self.supervision.report_run_directory(run_dir)
            self.record_run_directory(run_dir)
        redirect_output(run_dir / "ranks", self.rank, self.size)

    def show_with(self, notify: Callable[[str], bool]) -> None:
        def show(text: str) -> None:
            if not notify(text):
                write_to_stderr(f"llmtrain: {text}")

        self.heartbeat.show = show

    @contextmanager
    def saving(self) -> Iterator[None]:
        self.heartbeat.writes_since = time.monotonic()
        try:
            with self.supervision.saving():
                yield
        finally:
            self.heartbeat.writes_since = None

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        count = torch.tensor(int(flag))
        dist.all_reduce(count, group=self._host_group)
        return bool(count)

    def share(self, value: Any) -> Any:
        data = _encode(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor(len(data))
        dist.broadcast(length, 0, group=self._host_group)
        data = data if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._host_group)
        return _decode(data)

    def gather(self, value: Any) -> list[Any]:
        data = _encode(value)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(data)), group=self._host_group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._host_group)
        return [_decode(part[: int(length)]) for part, length in zip(parts, lengths, strict=True)]


def count_collectives() -> int:
    """The number of collective operations that this rank has begun with all others, as the backends count them.

    Every rank begins the same ones: a rank with fewer holds the others up.  Those between the stages of a pipeline
    differ.
    """
    total = 0
    with contextlib.suppress(RuntimeError, ValueError):  # a backend that does not count; the end of the world
        for group in list(distributed_c10d._world.pg_map) if dist.is_initialized() else []:
            if group.size() == dist.get_world_size() and "pipeline" not in group.group_desc:
                total += int(getattr(group, "_get_sequence_number_for_group")())  # noqa: B009 - the stubs lack it
    return total


def _encode(value: Any) -> Tensor:
    return torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())


def _decode(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
