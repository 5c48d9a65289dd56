"""A run's membership in a world of ranks, from its start to its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmtrain.base.ranks import RankPlace, find_rank, refuse_several_processes
from llmtrain.base.runtime import Runtime
from llmtrain.base.world import ALONE, World
from llmtrain.distributed.heartbeat import Heartbeat
from llmtrain.distributed.options import Distributed
from llmtrain.distributed.rank_exit import abandon, leave
from llmtrain.distributed.supervision import Supervision

if TYPE_CHECKING:
    from llmtrain.distributed.process_group import ProcessGroup

_joined: list[ProcessGroup] = []  # the world of this process; torch's own default group is global, too


@contextmanager
def join(options: Distributed, runtime: Runtime) -> Iterator[World]:
    """Join the ranks that a launcher has started this command as, for the length of a run; else be alone.

    Each rank of a machine takes a GPU of its own.  After an error the process has to end by :func:`abandon_run`: the
    other ranks may wait for it in the middle of a step.  Raises ValueError if the mesh of ``options`` does not fit,
    naming what would.
    """
    if not options.is_parallel:
        refuse_several_processes()
    place = find_rank()
    options.mesh(1 if place is None else place.size)
    if place is None:
        yield ALONE
        return
    from llmtrain.distributed.process_group import ProcessGroup

    take_gpu(place, runtime)
    os.environ |= {  # as torchrun sets them
        "RANK": str(place.rank), "WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size), "MASTER_ADDR": place.address, "MASTER_PORT": str(place.port),
    }  # fmt: skip
    supervision = Supervision.of(os.environ, place.rank)
    heartbeat = Heartbeat(
        place.address, place.port, place.rank, place.size, timeout_seconds=options.timeout_seconds,
        supervision=supervision, generation=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )  # fmt: skip
    world = ProcessGroup.open(runtime.torch_device(), options.timeout_seconds, heartbeat, supervision)
    world.local_size = place.local_size
    _joined.append(world)
    heartbeat.start()
    yield world
    leave(0, world, heartbeat)
    _joined.clear()


def take_gpu(place: RankPlace, runtime: Runtime) -> None:
    """Make the GPU of this rank the current one, where it trains on one."""
    import torch

    if ":" in runtime.device:
        raise ValueError(
            f"runtime.device={runtime.device}: each of {place.size} processes takes a GPU of its own; cuda, or auto"
        )
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return
    if place.local_size > torch.cuda.device_count():
        raise ValueError(
            f"distributed: {place.local_size} processes on a machine with {torch.cuda.device_count()} GPUs; one for "
            "each, or runtime.device=cpu"
        )
    torch.cuda.set_device(place.local_rank)


def abandon_run(error: BaseException, status: int) -> None:
    """End this process at once with ``status`` if it is a rank that has not left its world; the others are told.

    The error has been shown.
    """
    for world in _joined:
        abandon(error, status=status, supervision=world.supervision, heartbeat=world.heartbeat)
