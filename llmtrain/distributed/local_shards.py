"""The parameters of a sharded unit as this rank holds them: plain tensors, by the names of checkpoints."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmtrain.base.places import Place
from llmtrain.optimizer import Trainable


class Peers(Protocol):
    """The ranks that hold a unit together: a world, or those of it that have the same stages of a pipeline."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """True for one of them."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks; returns it."""
        ...


@dataclass(frozen=True, eq=False)
class LocalShard:
    """A parameter of the unit and this rank's part of it, in the same memory."""

    whole: nn.Parameter  # of the unit: a DTensor, or a plain one that every rank holds as a whole
    local: nn.Parameter  # plain; without rows where there are fewer rows than ranks
    place: Place
    copies: int  # ranks that hold the same elements

    def gather(self, part: Tensor) -> Tensor:
        """Put together the whole tensor of which this rank has ``part``; a collective."""
        if not isinstance(self.whole, DTensor):
            return part
        # a stride without overlap, also where this rank has no row
        strides = [math.prod(self.place.whole[dim + 1 :]) for dim in range(len(self.place.whole))]
        return DTensor.from_local(
            part, self.whole.device_mesh, self.whole.placements, run_check=False,
            shape=torch.Size(self.place.whole), stride=tuple(strides),
        ).full_tensor()  # fmt: skip

    def own_part(self, whole: Tensor) -> Tensor:
        """This rank's part of ``whole``, a view."""
        for dim, (begin, size) in enumerate(zip(self.place.offset, self.local.shape, strict=True)):
            whole = whole.narrow(dim, begin if size else 0, size)
        return whole


class LocalShards:
    """The view of an optimizer of a unit whose parameters are DTensors, on any mesh of ``peers``.

    Made once the unit is sharded and its parameters have their memory.  A gradient reaches the optimizer by
    :meth:`take_gradients`.
    """

    def __init__(self, unit: Trainable, peers: Peers) -> None:
        self.unit = unit
        self.peers = peers
        self.shards = {name: local_shard(parameter, peers) for name, parameter in unit.named_weights()}
        self._shares: dict[tuple[str, ...], Tensor] = {}

    # --- the view of an optimizer: ShardedTrainable -----------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return self.unit.num_layers

    @property
    def trained_names(self) -> Sequence[str]:
        return self.unit.trained_names

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, shard in self.shards.items():
            yield name, shard.local

    def layer_index(self, name: str) -> int:
        return self.unit.layer_index(name)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        return self.shards[name].place.whole

    def first_element(self, name: str) -> int:
        return self.shards[name].place.first_element

    def gather(self, name: str, part: Tensor) -> Tensor:
        return self.shards[name].gather(part)

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        return self.shards[name].own_part(whole)

    # --- the parts --------------------------------------------------------------------------------------------------

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parts of the trained parameters."""
        return [(name, shard.local) for name, shard in self.shards.items() if shard.local.requires_grad]

    def places(self) -> Mapping[str, Place]:
        """The boxes of the parameters that are sharded."""
        return {name: shard.place for name, shard in self.shards.items() if isinstance(shard.whole, DTensor)}

    def take_gradients(self) -> None:
        """Give each part the gradient that backward has left, in the same memory."""
        for shard in self.shards.values():
            gradient = shard.whole.grad
            shard.local.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient

    def drop_gradients(self) -> None:
        """Free the gradients of the parts and of the unit."""
        for shard in self.shards.values():
            shard.whole.grad = shard.local.grad = None

    # --- numbers about whole tensors --------------------------------------------------------------------------------

    def sum_of_squares(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        """Sum ``squares`` ``(parameters,)``, of this rank's parts, over the whole tensors: one exchange.

        Elements that several ranks hold count once.
        """
        key = tuple(names)
        if key not in self._shares:  # not a copy from the host at each step
            shares = [1 / self.shards[name].copies for name in names]
            self._shares[key] = torch.tensor(shares, dtype=squares.dtype).to(squares.device)
        return self.peers.sum(squares * self._shares[key])

    def largest(self, value: Tensor) -> Tensor:
        """The largest ``value`` of all ranks; NaN if one of them is."""
        return largest_of(value, self.peers)


def largest_of(value: Tensor, peers: Peers) -> Tensor:
    """The largest ``value``, 0-dimensional, of all ``peers``; NaN if one of them is."""
    # A sum of the values side by side: the maximum of some libraries loses a NaN.
    values = value.new_zeros(peers.size)
    values[peers.rank] = value
    return peers.sum(values).amax()


def local_shard(parameter: nn.Parameter, peers: Peers) -> LocalShard:
    """This rank's part of ``parameter``, and its place in the whole."""
    if not isinstance(parameter, DTensor):
        shape = tuple(parameter.shape)
        return LocalShard(parameter, parameter, Place((0,) * len(shape), shape, peers.is_first), peers.size)
    mesh, placements = parameter.device_mesh, parameter.placements
    local = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
    whole = tuple(parameter.shape)
    _, offset = compute_local_shape_and_global_offset(whole, mesh, placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    # ``is_shard()`` is False for the placement that FSDP gives a parameter of tensor parallelism
    is_replicate = [placement.is_replicate() for placement in placements]
    is_owner = all(at == 0 for at, replicates in zip(coordinate, is_replicate, strict=True) if replicates)
    parts = math.prod(size for size, replicates in zip(mesh.shape, is_replicate, strict=True) if not replicates)
    offset = tuple(min(begin, size) for begin, size in zip(offset, whole, strict=True))
    return LocalShard(parameter, local, Place(offset, whole, is_owner), peers.size // parts)
