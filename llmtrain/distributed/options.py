"""The ``distributed`` group: the mesh of a run's processes, and their start.

Importing this module does not import torch.
"""

from dataclasses import dataclass, fields
from math import prod

from llmtrain.base.checks import non_negative, positive
from llmtrain.base.options import Option

REST = -1  # as a degree: what the other degrees leave of the processes
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")  # orders of a pipeline's passes


@dataclass(frozen=True)
class Mesh:
    """The degrees of a mesh; their product is the number of ranks."""

    pipeline: int = 1  # ranks that each hold some of the layers, on the same sequences
    replicate: int = 1  # groups of ranks that each hold all weights, and add up their gradients
    shard: int = 1  # ranks that share the weights of a group
    context: int = 1  # ranks that share the positions of every sequence
    tensor: int = 1  # ranks that share the work of every layer, on the same sequences

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(self.degrees.values())

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees by their keys."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Distributed(Option):
    """A run of one process or of several.

    Ranks are neighbours by ``tensor`` first, then by ``context`` and ``shard``: those that exchange the most are on one
    machine, if it has as many.
    """

    processes: int | None
    min_processes: int | None
    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int
    pipeline_schedule: str
    stages_per_process: int
    reshard_after_forward: bool
    sequence_parallel: bool
    timeout_seconds: float
    restarts: int
    hostfile: str | None
    ssh: str

    def __post_init__(self) -> None:
        if self.processes is not None:
            positive(processes=self.processes)
        for key, degree in self.degrees.items():
            if degree != REST and degree < 1:
                raise ValueError(f"{key}={degree}: must be at least 1, or -1 for what the other degrees leave")
        rest = [key for key, degree in self.degrees.items() if degree == REST]
        if len(rest) > 1:
            raise ValueError(f"{rest[1]}=-1: {rest[0]} takes what is left already; give one of them")
        if self.pipeline_schedule not in SCHEDULES:
            raise ValueError(f"pipeline_schedule={self.pipeline_schedule}: must be one of {', '.join(SCHEDULES)}")
        positive(stages_per_process=self.stages_per_process, timeout_seconds=self.timeout_seconds)
        non_negative(restarts=self.restarts)
        if self.min_processes is not None:
            positive(min_processes=self.min_processes)
            if self.restarts == 0:
                raise ValueError(
                    f"min_processes={self.min_processes}: is about restarts, and restarts=0 makes none; restarts=3, "
                    "or min_processes=null"
                )

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees of the mesh as configured, by their keys."""
        return {field.name: getattr(self, field.name) for field in fields(Mesh)}

    @property
    def is_parallel(self) -> bool:
        """True if the options are for several processes."""
        return any(degree != 1 for degree in self.degrees.values())

    def mesh(self, size: int) -> Mesh:
        """The mesh of ``size`` ranks.  Raises ValueError if the degrees do not fit."""
        given = prod(degree for degree in self.degrees.values() if degree != REST)
        named = " × ".join(f"{key}={degree}" for key, degree in self.degrees.items() if degree not in (1, REST))
        has_rest = REST in self.degrees.values()
        if size % given or (given != size and not has_rest):
            remedy = "distributed.processes={0}" if not has_rest else "a number of processes that it divides"
            raise ValueError(
                f"distributed: {named or 'a mesh of 1'} does not make a mesh of {size} "
                f"process{'es' if size > 1 else ''}; {remedy.format(given)}, or another degree (-1: what is left)"
            )
        return Mesh(**{key: size // given if degree == REST else degree for key, degree in self.degrees.items()})

    def is_sharded(self, mesh: Mesh) -> bool:
        """True if the ranks of ``mesh`` hold a part of each weight.

        Weights are divided over ``shard`` × ``context``, also where ``shard`` is to take what is left, which is 1.
        """
        return mesh.shard > 1 or (mesh.context > 1 and self.shard == REST)

    def local_processes(self, gpus: int) -> int:
        """The number of ranks to start on this machine, which has so many ``gpus``, where no launcher has.

        Raises ValueError where it has to be named.
        """
        if self.processes is not None:
            return self.processes
        if not self.is_parallel:
            return 1
        if REST not in self.degrees.values():
            return prod(self.degrees.values())
        if gpus:
            return gpus
        raise ValueError(
            "distributed.processes=null: one process for each GPU of this machine, which has none; "
            "distributed.processes=2 starts two on its CPU"
        )
