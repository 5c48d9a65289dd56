"""A run's membership in a world of ranks, from its start to its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from llmtrain.base.ranks import find_rank, refuse_several_processes
from llmtrain.base.runtime import Runtime
from llmtrain.base.world import ALONE, World
from llmtrain.distributed.options import Distributed


@contextmanager
def join(options: Distributed, runtime: Runtime) -> Iterator[World]:
    """Join the ranks that a launcher has started this command as, for the length of a run; else be alone.

    Each rank of a machine takes a GPU of its own.  Raises ValueError if the mesh of ``options`` does not fit, naming
    what would.
    """
    if not options.is_parallel:
        refuse_several_processes()
    place = find_rank(os.environ)
    options.mesh(1 if place is None else place.size)
    if place is None:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    from llmtrain.distributed.process_group import ProcessGroup

    if ":" in runtime.device:
        raise ValueError(f"runtime.device={runtime.device}: each of {place.size} processes takes a GPU of its own; "
                         "take cuda, or auto")  # fmt: skip
    if runtime.device != "cpu" and torch.cuda.is_available():
        if place.local_size > torch.cuda.device_count():
            raise ValueError(
                f"distributed: {place.local_size} processes on a machine with {torch.cuda.device_count()} GPUs; one "
                "for each, or runtime.device=cpu"
            )
        torch.cuda.set_device(place.local_rank)
    os.environ |= {  # as torchrun sets them
        "RANK": str(place.rank), "WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size), "MASTER_ADDR": place.address, "MASTER_PORT": str(place.port),
    }  # fmt: skip
    world = ProcessGroup.open(runtime.torch_device(), options.timeout_seconds)
    world.local_size = place.local_size
    yield world
    world.barrier()  # without an error; after one the process ends without waiting for others
    dist.destroy_process_group()
