"""Data parallelism: ranks that train one unit on different sequences, each with the whole unit or a shard of it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from llmtrain.base.places import Places
from llmtrain.base.world import World
from llmtrain.data import Batch
from llmtrain.distributed.context import SharedPositions
from llmtrain.distributed.local_shards import LocalShards, Peers
from llmtrain.distributed.parallel import Parallel
from llmtrain.objective import TrainingUnit
from llmtrain.optimizer import Trainable


class DataParallel(Parallel):
    """Ranks with different tokens: all of ``mesh``, numbered along its dimensions.

    With ``positions`` neighbours in this order have the same sequences, and share their positions.
    """

    def __init__(
        self, unit: TrainingUnit, world: World, mesh: DeviceMesh, positions: SharedPositions | None = None
    ) -> None:
        super().__init__(unit, world)
        self.mesh = mesh
        self.positions = positions

    @property
    def data_rank(self) -> int:
        return self.seed_rank // self._neighbours

    @property
    def data_size(self) -> int:
        return self.mesh.size() // self._neighbours

    @property
    def _neighbours(self) -> int:
        """Ranks that have the same sequences."""
        return 1 if self.positions is None else self.positions.ranks.size

    @property
    def seed_rank(self) -> int:
        number = 0
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        for at, size in zip(coordinate, self.mesh.shape, strict=True):
            number = number * size + at
        return number

    def whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.positions is None else self.positions.suspended()


class Replicated(DataParallel):
    """The whole unit on each rank, gradients summed while backward still runs: torch's DistributedDataParallel.

    ``mesh`` has one dimension.  What is trained must not change afterwards: parameters that get no
    gradient, or are frozen later, are an error of torch's in the step after.
    """

    def __init__(
        self, unit: TrainingUnit, world: World, mesh: DeviceMesh, positions: SharedPositions | None = None
    ) -> None:
        super().__init__(unit, world, mesh, positions)
        # frozen weights in few bits have a parameter without data in their place
        without_data = [name for name, parameter in unit.named_parameters() if parameter.is_meta]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(unit, without_data)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # its successor is not there yet
            self.ddp = DistributedDataParallel(
                unit, process_group=mesh.get_group(), broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = self.ddp(batch)
        return sums

    def prepare(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self.ddp.no_sync()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        (loss * self.mesh.size()).backward()  # DistributedDataParallel takes the mean over the ranks


class Sharded(DataParallel):
    """A shard of each parameter, of its gradient and its optimizer state on each rank: torch's ``fully_shard`` (FSDP2).

    A parameter is divided along its first dimension.  Whole weights are gathered for a block at a time; the rest of
    the unit (embeddings, final norm, heads) stays gathered from the forward pass to the end of the backward pass.

    ``mesh`` has the dimension ``shard``, and for HSDP ``replicate`` before it: shards are then divided over the ranks
    of ``shard``, and their gradients summed over those of ``replicate``, once a step.

    ``reshard_after_forward``: blocks are gathered for backward again; False keeps them, for less traffic and more
    memory.  ``keeps_whole_gradients``: gradients are summed over the ranks after the last micro-batch alone; until then
    each rank holds whole ones, in the memory of whole weights.  Otherwise each micro-batch's are scattered at once.

    ``roots``: the modules that are called, each with its blocks, where that is not the unit but the stages of a
    pipeline; then ``own`` are the parameters of this rank's stages, and ``peers`` the ranks that have the same stages.

    The parameters may be on ``meta`` when this is built.  They need memory before :attr:`shards` is read.
    """

    holds_parts: ClassVar[bool] = True
    keeps_casts: ClassVar[bool] = False

    def __init__(
        self,
        unit: TrainingUnit,
        world: World,
        mesh: DeviceMesh,
        positions: SharedPositions | None = None,
        *,
        reshard_after_forward: bool = True,
        keeps_whole_gradients: bool = False,
        roots: Sequence[tuple[nn.Module, Sequence[nn.Module]]] | None = None,
        own: Trainable | None = None,
        peers: Peers | None = None,
    ) -> None:
        super().__init__(unit, world, mesh, positions)
        refuse_packed(unit)
        self.reshard_after_forward = reshard_after_forward
        self.keeps_whole_gradients = keeps_whole_gradients
        self.own, self.peers = own or unit, peers or world
        self._roots: list[Any] = []
        for root, blocks in roots or [(unit, list(unit.model.blocks))]:
            for block in blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
            fully_shard(root, mesh=mesh, reshard_after_forward=False)
            for name in ("score", "sequence_losses", "_gather_outer"):
                setattr(root, name, getattr(root, name, _nothing))
                register_fsdp_forward_method(root, name)
            self._roots.append(root)
        self.modules = [module for root in self._roots for module in root.modules() if isinstance(module, FSDPModule)]
        for module in self.modules:
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
            module.set_gradient_divide_factor(1.0)
        self._is_last: bool | None = None  # as :meth:`prepare` has set it

    @cached_property
    def shards(self) -> LocalShards:
        """This rank's part of every parameter."""
        for module in self.modules:
            module.reshard()
        return LocalShards(self.own, self.peers)

    @property
    def trainable(self) -> Trainable:
        return self.shards

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        return self.shards.trained()

    def places(self) -> Places:
        return self.shards.places()

    @contextmanager
    def prepare(self, *, is_last: bool) -> Iterator[None]:
        if is_last != self._is_last:
            self._is_last = is_last
            for root in self._roots:
                root.set_is_last_backward(is_last)
                root.set_requires_gradient_sync(is_last or not self.keeps_whole_gradients)
                root.set_requires_all_reduce(is_last)
        yield

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()
        if is_last:
            self.take_gradients()

    def take_gradients(self) -> None:
        """Give each part of a parameter the gradient that the last backward pass has left."""
        self.shards.take_gradients()

    def drop_gradients(self) -> None:
        self.shards.drop_gradients()

    def sum_of_squares(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        return self.shards.sum_of_squares(squares, names)

    def largest(self, value: Tensor) -> Tensor:
        return self.shards.largest(value)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        try:
            with casts_not_kept():
                yield
        finally:
            self._end_passes()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Context in which every rank has the whole weights: in it one rank alone may call the model.

        Entering gathers them, on all ranks.  They take the memory of the whole unit beside the shards.
        """
        with torch.no_grad():
            for root in self._roots:
                root._gather_outer()  # the first pass of all must be the root's
        for module in self.modules:
            module.set_reshard_after_forward(False, recurse=False)
        handles = [module.unshard(async_op=True) for module in self.modules]
        for handle in handles:
            if handle is not None:
                handle.wait()
        try:
            with super().whole_weights():
                yield
        finally:
            self._end_passes()
            for module in self.modules:
                module.set_reshard_after_forward(
                    self.reshard_after_forward and module not in self._roots, recurse=False
                )

    def _end_passes(self) -> None:
        """Have sharded weights alone, which may be loaded next, and forget the forward passes without a backward pass.

        torch records the order of forward passes, and backward gathers in that order ahead of time: on all ranks alike,
        or they wait for one another forever.
        """
        for module in self.modules:
            module.reshard()
        if hasattr(self._roots[0], "reset_iter_state"):
            for root in self._roots:
                root.reset_iter_state()
            return
        for module in self.modules:  # torch before 2.13
            state: Any = module._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            if state._fsdp_param_group is not None:
                state._fsdp_param_group._post_forward_indices.clear()


def _nothing() -> None:
    pass


def refuse_packed(unit: TrainingUnit) -> None:
    """Raise ValueError if frozen weights of ``unit`` are packed, in formats that cannot be divided by rows."""
    packed = [name for name, module in unit.named_modules() if getattr(module, "packed", None) is not None]
    if packed:
        raise ValueError(
            f"lora.quantization: packed weights cannot be divided by rows ({packed[0]} is one of {len(packed)}); take "
            "lora.quantization=none, or distributed=ddp, where each rank has whole weights"
        )


@contextmanager
def casts_not_kept() -> Iterator[None]:
    """Context in which autocast keeps no casts: they would be those of each block's whole weights."""
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caches)
