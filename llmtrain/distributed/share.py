"""The choice of the way in which ranks share a unit."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llmtrain.base.world import World
from llmtrain.distributed.deepspeed import DeepSpeed
from llmtrain.distributed.local_sgd import LocalSgd
from llmtrain.distributed.options import Distributed, Mesh
from llmtrain.distributed.parallel import Parallel
from llmtrain.objective import TrainingUnit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from llmtrain.distributed.context import SharedPositions


def share_unit(options: Distributed, unit: TrainingUnit, world: World, device: torch.device) -> Parallel:
    """Share ``unit``, built alike on every rank, among the ranks of ``world`` by the mesh that ``options`` name.

    A unit that is on the meta device gets the memory of this rank's parts alone, on ``device``, without values; its
    buffers are on ``device`` already.
    """
    if isinstance(options, LocalSgd):
        return _share_by_replicas(options, unit, world, device)
    if world.size == 1:
        return Parallel(unit, world)
    from llmtrain.distributed.context import SharedPositions
    from llmtrain.distributed.process_group import ProcessGroup
    from llmtrain.distributed.rank_group import RankGroup
    from llmtrain.distributed.tensor import TensorParallel
    from llmtrain.distributed.tensor_group import TensorGroup
    from llmtrain.distributed.unit_cut import UnitCut

    assert isinstance(world, ProcessGroup)
    degrees = options.mesh(world.size)
    mesh, positions = world.mesh(degrees, device), None
    if isinstance(options, DeepSpeed):
        from llmtrain.distributed.zero import Zero

        return Zero(unit, world, mesh["shard"], options.settings())
    if degrees.pipeline > 1:
        from llmtrain.distributed.pipeline import Pipeline

        return Pipeline(unit, world, mesh, options)
    if degrees.context > 1:
        positions = SharedPositions(unit, RankGroup(mesh.get_group("context")))
        mesh = world.mesh(with_context_as_data(degrees, is_sharded=options.is_sharded(degrees)), device)
    if degrees.tensor == 1:
        return share_data(options, unit, world, mesh, positions)
    cut = UnitCut(unit, TensorGroup(mesh.get_group("tensor")), sequence_parallel=options.sequence_parallel)
    return TensorParallel(share_data(options, unit, world, mesh, positions), cut)


def with_context_as_data(degrees: Mesh, *, is_sharded: bool) -> Mesh:
    """The same ranks in the same order, those of ``context`` among those that sum gradients or divide weights."""
    if is_sharded:
        return replace(degrees, shard=degrees.shard * degrees.context, context=1)
    return replace(degrees, replicate=degrees.replicate * degrees.context, context=1)


def share_data(
    options: Distributed,
    unit: TrainingUnit,
    world: World,
    mesh: "DeviceMesh",
    positions: "SharedPositions | None" = None,
) -> Parallel:
    """Share ``unit`` among the ranks of ``mesh`` that train on different tokens.

    With ``positions`` neighbours in their order have the same sequences.
    """
    from llmtrain.distributed.allocation import allocate, device_of, is_described
    from llmtrain.distributed.data_parallel import Replicated, Sharded

    replicate, shard, has_memory = mesh["replicate"].size(), mesh["shard"].size(), not is_described(unit)
    if shard == 1:
        if not has_memory:
            allocate(unit, device_of(mesh))
        return Parallel(unit, world) if replicate == 1 else Replicated(unit, world, mesh["replicate"], positions)
    part = mesh["shard"] if replicate == 1 else mesh["replicate", "shard"]
    sharded = Sharded(unit, world, part, positions, reshard_after_forward=options.reshard_after_forward)
    if not has_memory:
        allocate(unit, device_of(mesh))
    return sharded


def _share_by_replicas(options: LocalSgd, unit: TrainingUnit, world: World, device: torch.device) -> Parallel:
    """Give each rank weights of its own."""
    from llmtrain.distributed.process_group import ProcessGroup
    from llmtrain.distributed.replicas import Replicas

    if world.size == 1:
        return Replicas(options, unit, world)
    assert isinstance(world, ProcessGroup)
    mesh = world.mesh(options.mesh(world.size), device)
    return Replicas(options, unit, world, mesh.get_group("replicate"))
