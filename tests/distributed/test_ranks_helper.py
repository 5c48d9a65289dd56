"""The helper that runs functions on several ranks."""

import os
import time

import pytest
import torch

from llmtrain.base.world import World
from tests.helpers.ranks import RankFailed, Ranks


def agree(world: World, number: int) -> list[object]:
    total = world.sum(torch.tensor(float(number + world.rank))).item()
    world.barrier()
    return [
        world.rank, total, world.any(world.rank == 1), world.any(False), world.share(["a", world.rank]),
        world.gather({"rank": world.rank, "text": "ü" * world.rank}),
    ]  # fmt: skip


def fail_on_one(world: World, way: str) -> None:
    print(f"rank {world.rank} is about to {way}", flush=True)
    if world.rank == 1 and way == "raise":
        raise ValueError("no such thing")
    if world.rank == 1 and way == "exit":
        os._exit(3)
    if world.rank == 1 and way == "sleep":
        time.sleep(60)
    world.barrier()


def test_ranks_agree(two: Ranks) -> None:
    gathered = [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}]
    assert two.run(agree, 3) == [[rank, 7.0, True, False, ["a", 0], gathered] for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("raise", "rank 1: ValueError: no such thing"),
        ("exit", "rank 1: has ended with status 3|reset|closed"),
        ("sleep", "no answer of ranks"),
    ],
)
def test_failure_shows_every_rank_and_the_next_call_works(two: Ranks, way: str, message: str) -> None:
    with pytest.raises(RankFailed, match=message) as caught:
        two.run(fail_on_one, way, timeout_seconds=2 if way == "sleep" else 60)
    assert f"rank 0 is about to {way}" in str(caught.value)
    assert two.run(agree, 3)[1][1] == 7.0
