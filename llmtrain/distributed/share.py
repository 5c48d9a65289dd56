"""The choice of the way in which ranks share a unit."""

import torch

from llmtrain.base.world import World
from llmtrain.distributed.options import Distributed
from llmtrain.distributed.parallel import Parallel
from llmtrain.objective import TrainingUnit


def share_unit(options: Distributed, unit: TrainingUnit, world: World, device: torch.device) -> Parallel:
    """Share ``unit``, built alike on every rank, among the ranks of ``world`` by the mesh that ``options`` name."""
    if world.size == 1:
        return Parallel(unit, world)
    from llmtrain.distributed.data_parallel import Replicated, Sharded
    from llmtrain.distributed.process_group import ProcessGroup

    assert isinstance(world, ProcessGroup)
    degrees = options.mesh(world.size)
    mesh = world.mesh(degrees, device)
    if degrees.shard == 1:
        return Replicated(unit, world, mesh)
    return Sharded(unit, world, mesh, reshard_after_forward=options.reshard_after_forward)
