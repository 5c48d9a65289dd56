"""Ranks of real runs that sleep for ever: in the loader, before a collective operation, in a save; each is named."""

import socket
import time
from pathlib import Path

import pytest

from tests.faults.rank_kills import RunningRanks, Shape
from tests.faults.victims import assert_all_whole
from tests.helpers.launcher import Launcher

TIMEOUT = 20.0
SLEEP = """
import os, time
def hang_at(owner, name, number):
    call, left = getattr(owner, name), [number]
    def counted(*arguments, **keywords):
        left[0] -= 1
        if left[0] == 0:
            time.sleep(10**6)
        return call(*arguments, **keywords)
    setattr(owner, name, counted)
"""
HANGS = {
    "loader": (
        "from llmtrain.data.loader import BatchThread; hang_at(BatchThread, 'take', 5)",
        "has been in the data loader at step 4",
    ),
    "collective": (
        "import torch; hang_at(torch.Tensor, 'backward', 5)",
        "has not begun an operation that the others wait in, in forward and backward",
    ),
    "save": ("hang_at(os, 'fsync', 12)", "has been writing a checkpoint for"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", HANGS)
def test_a_rank_that_sleeps_for_ever_is_named(launcher: Launcher, tmp_path: Path, place: str) -> None:
    harm, message = HANGS[place]
    shape = Shape(2, "fsdp", timeout_seconds=TIMEOUT)
    run = tmp_path / "run"
    ranks = RunningRanks(launcher, shape, run, supervised=False, preludes={1: SLEEP + harm})
    began = time.monotonic()
    try:
        ranks.victims[0].wait(1, seconds=200)
        ranks.victims[1].wait(1, seconds=30)
    finally:
        print(ranks.text())
    print(f"ended after {time.monotonic() - began:.0f} s with a time-out of {TIMEOUT:g} s")
    text = (run / "train.log").read_text()
    assert f"rank 1 on host {socket.gethostname()} {message}" in text
    assert "hang_at" in (run / "ranks" / "stacks-00001.txt").read_text() or "counted" in text
    assert_all_whole(run)
