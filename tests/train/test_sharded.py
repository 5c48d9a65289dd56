"""A training unit is sharded from outside: FSDP2 on two ranks gives the losses of one process."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FSDPModule, fully_shard

from llmtrain import Run
from llmtrain.config.assemble import assemble
from llmtrain.train.step import Step
from tests.helpers.cli import TINY

STEPS = 5


def losses(rank: int, ranks: int) -> list[float]:
    """The losses of some steps of ``ranks`` processes; each has its part of every batch."""
    run = Run.compose(*TINY, "precision=fp32", "optimizer=adamw", "accumulation.batch_size=6", "loop.max_steps=5")
    parts = assemble(run, torch.device("cpu"))
    unit, train = parts.unit, parts.corpus.train
    if ranks > 1:
        for module in (*unit.model.blocks, unit):
            fully_shard(module)
        for module in unit.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
    step = Step(unit, run.optimizer.build(unit), parts.precision, micro_batch_size=2)
    found = []
    for number in range(STEPS):
        positions = np.arange(6 * number, 6 * number + 6)
        batch = run.objective.collate(train.gather(positions), positions, 0).shard(rank, ranks)
        loss = step.gradients(batch).total
        step.optimizer.step()
        step.optimizer.zero_grad()
        if ranks > 1:
            dist.all_reduce(loss)
        found.append(loss.item())
    return found


def work(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    torch.save(losses(rank, ranks), folder / f"losses-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_sharded_ranks_give_the_losses_of_one_process(tmp_path: Path) -> None:
    mp.start_processes(work, (2, tmp_path), nprocs=2, start_method="spawn")
    alone = losses(0, 1)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"losses-{rank}") == pytest.approx(alone, rel=1e-6)
    assert alone[-1] < alone[0]
