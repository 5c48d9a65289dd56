"""A run's membership in a world of ranks, from its start to its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.base.ranks import RankPlace, find_rank, refuse_several_processes
from llmtrain.base.runtime import Runtime
from llmtrain.base.world import ALONE, Alone, World
from llmtrain.distributed.heartbeat import Heartbeat
from llmtrain.distributed.options import Distributed
from llmtrain.distributed.rank_exit import abandon, leave
from llmtrain.distributed.supervision import Supervision, is_supervised
from llmtrain.distributed.torchrun import START, JobStore, Start, is_torchrun, record_path

# The membership of this process, from its start; torch's own default group is global, too
_joined: list[tuple[Supervision, Heartbeat]] = []


_met: list[tuple[JobStore, Start]] = []  # the store of this process under torchrun, which rank 0 may have


class OnlyRank(Alone):
    """The only rank of a job, which others may join, or follow, at its next start."""

    def __init__(self, supervision: Supervision) -> None:
        self.supervision = supervision

    def begin(self, run_dir: Path) -> None:
        self.supervision.report_run_directory(run_dir)
        record_run_directory(run_dir)


def record_run_directory(run_dir: Path) -> None:
    """Record for torchrun's next start of the ranks where the run is, so that it can be resumed."""
    for store, start in _met:
        store.record_run_directory(run_dir, start)


def is_rank() -> bool:
    """Return whether a launcher, torchrun's agent or a supervisor of this program has started this process as a rank.

    It may be the only one: of a job that has lost machines.
    """
    return find_rank() is not None or is_supervised() or is_torchrun(os.environ)


def meet(
    options: Distributed, run_dir: str | None = None, output_dir: str = ".",
    usable: Callable[[Path], Path | None] = lambda _: None,
) -> Start | None:  # fmt: skip
    """Agree with the other ranks under torchrun on the number of this start, and on the run that it resumes.

    None where there is nothing to agree on.  ``run_dir`` and ``output_dir`` are those of a new run; for ``usable`` see
    :meth:`JobStore.meet`.
    """
    if not is_torchrun(os.environ):
        return None
    if not _met:
        place = find_rank()
        rank, size = (0, 1) if place is None else (place.rank, place.size)
        store = JobStore(os.environ, rank, options.timeout_seconds)
        if START in os.environ:  # before this command took the place of another
            start = Start.parse(os.environ[START])
        else:
            start = store.meet(rank, size, record_path(run_dir, output_dir, os.environ), usable)
        _met.append((store, start))
    return _met[0][1]


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
    start = meet(options)
    if place is None:
        supervision = Supervision.of(os.environ, 0)
        yield ALONE if supervision.folder is None and start is None else OnlyRank(supervision)
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
        supervision=supervision, generation=str(start.number if start else 0),
    )  # fmt: skip
    _joined.append((supervision, heartbeat))
    heartbeat.start()  # a rank that never comes is named, too
    world = ProcessGroup.open(
        runtime.torch_device(), options.timeout_seconds, heartbeat, supervision,
        store=_met[0][0].of_start(start) if start else None,
    )  # fmt: skip
    world.record_run_directory = record_run_directory
    world.local_size = place.local_size
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
    for supervision, heartbeat in _joined:
        abandon(error, status=status, supervision=supervision, heartbeat=heartbeat)
