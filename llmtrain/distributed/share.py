"""The choice of the way in which ranks share a unit."""

from typing import TYPE_CHECKING

import torch

from llmtrain.base.world import World
from llmtrain.distributed.options import Distributed
from llmtrain.distributed.parallel import Parallel
from llmtrain.objective import TrainingUnit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def share_unit(options: Distributed, unit: TrainingUnit, world: World, device: torch.device) -> Parallel:
    """Share ``unit``, built alike on every rank, among the ranks of ``world`` by the mesh that ``options`` name."""
    if world.size == 1:
        return Parallel(unit, world)
    from llmtrain.distributed.process_group import ProcessGroup
    from llmtrain.distributed.tensor import TensorParallel
    from llmtrain.distributed.tensor_group import TensorGroup
    from llmtrain.distributed.unit_cut import UnitCut

    assert isinstance(world, ProcessGroup)
    degrees = options.mesh(world.size)
    mesh = world.mesh(degrees, device)
    if degrees.pipeline > 1:
        from llmtrain.distributed.pipeline import Pipeline

        return Pipeline(unit, world, mesh, options, device)
    if degrees.tensor == 1:
        return share_data(options, unit, world, mesh)
    cut = UnitCut(unit, TensorGroup(mesh.get_group("tensor")), sequence_parallel=options.sequence_parallel)
    return TensorParallel(share_data(options, unit, world, mesh), cut)


def share_data(options: Distributed, unit: TrainingUnit, world: World, mesh: "DeviceMesh") -> Parallel:
    """Share ``unit`` among the ranks of ``mesh`` that train on different sequences."""
    from llmtrain.distributed.data_parallel import Replicated, Sharded

    replicate, shard = mesh["replicate"].size(), mesh["shard"].size()
    if replicate == shard == 1:
        return Parallel(unit, world)
    if shard == 1:
        return Replicated(unit, world, mesh["replicate"])
    part = mesh["shard"] if replicate == 1 else mesh["replicate", "shard"]
    return Sharded(unit, world, part, reshard_after_forward=options.reshard_after_forward)
