"""The mesh of a cluster plan: how many ranks share what, and the groups in which they communicate."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmtrain.distributed.options import REST
from llmtrain.plan.shape import Shape

KEYS = ("replicate", "shard", "context", "tensor", "pipeline")


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with one another: ``size`` of them, ``stride`` apart in the order of the ranks."""

    size: int
    stride: int


@dataclass(frozen=True)
class Mesh:
    """The degrees of parallelism; ranks are ``pipeline × replicate × shard × context × tensor``, the last fastest.

    ``shards_context``: weights are divided over the ranks of ``context`` also where ``shard`` is 1.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    shards_context: bool = False
    named: str | None = None  # the option of the group, where degrees do not tell it

    def __post_init__(self) -> None:
        for name, value in self.degrees.items():
            if value < 1:
                raise ValueError(f"distributed.{name}={value}: must be at least 1")

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees by the names of their keys."""
        return {name: getattr(self, name) for name in KEYS}

    @property
    def devices(self) -> int:
        """The number of ranks."""
        return math.prod(self.degrees.values())

    @property
    def data(self) -> int:
        """The number of ranks that train on different sequences."""
        return self.replicate * self.shard

    @property
    def weight_parts(self) -> int:
        """The number of ranks among which weights, gradients and optimizer state are divided."""
        return self.shard * self.context if self.shard > 1 or self.shards_context else 1

    @property
    def tensor_group(self) -> Group:
        """The ranks that share each matrix product."""
        return Group(self.tensor, 1)

    @property
    def context_group(self) -> Group:
        """The ranks that share the positions of every sequence."""
        return Group(self.context, self.tensor)

    @property
    def shard_group(self) -> Group:
        """The ranks among which weights, gradients and optimizer state are divided."""
        return Group(self.weight_parts, self.tensor)

    @property
    def replicate_group(self) -> Group:
        """The ranks that hold the same part and add up their gradients."""
        copies = self.replicate * self.shard * self.context // self.weight_parts
        return Group(copies, self.tensor * self.weight_parts)

    @property
    def pipeline_group(self) -> Group:
        """The ranks that hold the stages one after the other."""
        return Group(self.pipeline, self.tensor * self.context * self.shard * self.replicate)

    def overrides(self, degrees: Collection[str] = KEYS) -> tuple[str, ...]:
        """The mesh as overrides of the group ``distributed``, which has the keys ``degrees``."""
        shown = self.degrees | ({"shard": REST} if self.shards_context else {})
        named = (f"distributed.{name}={value}" for name, value in shown.items() if name in degrees)
        return (f"distributed={self.option}", *named)

    @property
    def option(self) -> str:
        """The option of the group ``distributed``: as named, or the one that the mesh is closest to."""
        if self.named is not None:
            return self.named
        if self.pipeline > 1:
            return "pipeline"
        if self.tensor > 1:
            return "tensor"
        if self.context > 1 and self.weight_parts == self.replicate == 1:
            return "context"
        if self.weight_parts > 1:
            return "hsdp" if self.replicate > 1 else "fsdp"
        return "ddp" if self.replicate > 1 else "none"

    def check(self, shape: Shape, sequences: int) -> None:
        """Raise ValueError unless a model of ``shape`` and steps of ``sequences`` can be divided over the mesh."""
        if self.tensor > 1:
            _divides("tensor", self.tensor, shape.num_kv_heads, "key and value heads of the model")
            _divides("tensor", self.tensor, shape.intermediate_size, "channels of the feed-forward network")
        if self.pipeline > shape.num_layers:
            raise ValueError(
                f"distributed.pipeline={self.pipeline}: the model has {shape.num_layers} blocks; "
                f"take at most {shape.num_layers} stages"
            )
        if self.context > 1 and self.pipeline > 1:
            raise ValueError(
                f"distributed.context={self.context}: does not go with distributed.pipeline={self.pipeline}; take one "
                "of them as 1"
            )
        if sequences % self.data:
            nearest = max(1, round(sequences / self.data)) * self.data
            raise ValueError(
                f"accumulation.batch_size={sequences}: not divisible by the {self.data} ranks that train on different "
                f"sequences; take {nearest}, or another mesh"
            )


def mesh_of(devices: int, degrees: Mapping[str, int]) -> Mesh:
    """Build the mesh of ``devices`` ranks from degrees by their keys; those not named are 1, and -1 is what is left.

    Raises ValueError, with the key and a remedy, if the degrees do not multiply to ``devices``.
    """
    left = [name for name, value in degrees.items() if value == REST]
    if len(left) > 1:
        keys = " and ".join(f"distributed.{name}" for name in left)
        raise ValueError(f"{keys}=-1: only one degree can be what the others leave; give a number for the others")
    named: dict[str, Any] = {name: value for name, value in degrees.items() if value != REST}
    given = Mesh(**named)
    given = replace(given, shards_context=given.context > 1 and left == ["shard"])
    if left and devices % given.devices == 0:
        rest: dict[str, Any] = {left[0]: devices // given.devices}
        return replace(given, **rest)
    if left or given.devices != devices:
        shown = " × ".join(f"{name} {value}" for name, value in degrees.items() if value != 1)
        remedy = f"take devices={given.devices}" if not left else f"take a multiple of {given.devices}"
        if not left and given.devices == 1:
            remedy = "take distributed=fsdp, or distributed=auto for the fastest mesh"
        raise ValueError(f"devices={devices}: not the product of the mesh's degrees, {shown or 'all 1'}; {remedy}")
    return given


def possible_meshes(
    devices: int, shape: Shape, sequences: int, gpus_per_host: int, degrees: Collection[str] = KEYS
) -> Iterator[Mesh]:
    """Yield the meshes of ``devices`` ranks that a model and a batch can be divided over.

    ``degrees``: those that may be more than 1.  Tensor parallelism stays within a host; ``context`` is 1.
    """
    choices = [divisors(devices) if name in degrees else [1] for name in ("tensor", "pipeline", "shard")]
    for tensor, pipeline, shard in itertools.product(*choices):
        if devices % (tensor * pipeline * shard) or tensor > gpus_per_host:
            continue
        mesh = Mesh(devices // (tensor * pipeline * shard), shard, tensor, pipeline)
        if mesh.replicate > 1 and "replicate" not in degrees:
            continue
        try:
            mesh.check(shape, sequences)
        except ValueError:
            continue
        yield mesh


def divisors(number: int) -> list[int]:
    """The divisors of ``number``, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _divides(name: str, degree: int, size: int, meaning: str) -> None:
    if size % degree:
        best = max(candidate for candidate in divisors(size) if candidate < degree)
        raise ValueError(f"distributed.{name}={degree}: does not divide the {size} {meaning}; take {best}")
