"""Timing of the phases of a step."""

from pathlib import Path

import pytest
import torch

from llmtrain import Run
from llmtrain.config import stored_config
from llmtrain.run.directory import RunDirectory
from llmtrain.train.profiler import Profiler
from llmtrain.train.step_timer import StepTimer
from tests.helpers.cli import TINY, rows


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(stopwatch: StepTimer, clock: Clock, *parts: tuple[str, float]) -> None:
    stopwatch.start()
    for phase, seconds in parts:
        clock.now += seconds
        stopwatch.mark(phase)
    stopwatch.finish()


MICRO_BATCHES = (("data", 0.5), ("forward", 1.0), ("backward", 2.0), ("forward", 1.5), ("backward", 2.5),
                 ("optimizer", 0.25), ("other", 8.0), ("optimizer", 0.5))  # fmt: skip


def test_micro_batches_add_up_and_the_rest_is_other() -> None:
    clock = Clock()
    stopwatch = StepTimer(torch.device("cpu"), clock, Profiler())
    step(stopwatch, clock, *MICRO_BATCHES)
    clock.now += 4.0  # between two steps
    step(stopwatch, clock, ("data", 1.0), ("forward", 1.0), ("backward", 1.0), ("optimizer", 1.0))
    stopwatch.read()
    first = stopwatch.take(20.0)
    assert first == {"data": 0.5, "forward": 2.5, "backward": 4.5, "optimizer": 0.75, "other": 11.75}
    stopwatch.read()
    assert stopwatch.take(5.0) == {"data": 1.0, "forward": 1.0, "backward": 1.0, "optimizer": 1.0, "other": 1.0}
    shares = stopwatch.shares()
    assert shares == {"data": 0.06, "forward": 0.14, "backward": 0.22, "optimizer": 0.07, "other": 0.51}


def test_parts_never_add_up_to_more_than_the_whole() -> None:
    """The device may have been busy in the time of the row before."""
    clock = Clock()
    stopwatch = StepTimer(torch.device("cpu"), clock, Profiler())
    step(stopwatch, clock, ("data", 1.0), ("forward", 3.0), ("backward", 4.0))
    stopwatch.read()
    assert stopwatch.take(4.0) == {"data": 0.5, "forward": 1.5, "backward": 2.0, "optimizer": 0.0, "other": 0.0}
    assert stopwatch.take(0.0) == dict.fromkeys(("data", "forward", "backward", "optimizer", "other"), 0.0)


def test_a_repeated_step_counts_once_and_forget_clears_it() -> None:
    clock = Clock()
    stopwatch = StepTimer(torch.device("cpu"), clock, Profiler())
    assert stopwatch.shares() is None
    stopwatch.start()
    clock.now += 7.0
    stopwatch.mark("forward")
    step(stopwatch, clock, ("forward", 1.0))
    stopwatch.read()
    assert stopwatch.take(1.0)["forward"] == 1.0
    step(stopwatch, clock, ("forward", 1.0))
    stopwatch.read()
    stopwatch.forget()
    assert stopwatch.take(2.0)["forward"] == 0.0


@pytest.mark.parametrize("log_every", [1, 3])
def test_the_rows_hold_the_breakdown(tmp_path: Path, log_every: int) -> None:
    """The parts of each row add up to its step_seconds; forward and backward are most of a step's work."""
    run = Run.compose(*TINY, "accumulation.micro_batch_size=2", "loop.max_steps=6", "checkpoint.every_steps=2",
                      f"metrics.log_every={log_every}", f"run_dir={tmp_path / 'run'}")  # fmt: skip
    result = run.train()
    trained = [row for row in rows(result.run_dir) if "loss" in row and "event" not in row]
    assert [row["step"] for row in trained] == ([1, 3, 6] if log_every == 3 else [1, 2, 3, 4, 5, 6])
    for row in trained:
        parts = {phase: row[f"{phase}_seconds"] for phase in ("data", "forward", "backward", "optimizer", "other")}
        assert sum(parts.values()) == pytest.approx(row["step_seconds"], abs=1e-5)
        assert min(parts.values()) >= 0
        assert min(parts["forward"], parts["backward"], parts["optimizer"]) > 0
        assert parts["forward"] + parts["backward"] > parts["data"]
    assert sum(result.summary["time_shares"].values()) == pytest.approx(1.0)
    assert "time by phase    data " in (result.run_dir / "train.log").read_text()


def test_a_run_whose_rows_have_no_breakdown_is_resumed(tmp_path: Path) -> None:
    """As older versions wrote them."""
    import json

    from llmtrain.report.runs import summarise

    run = Run.compose(*TINY, "loop.max_steps=2", f"run_dir={tmp_path / 'run'}")
    directory = RunDirectory.open(run.train().run_dir)
    older = [
        {key: value for key, value in row.items() if key == "step_seconds" or not key.endswith("_seconds")}
        for row in rows(directory.path)
    ]
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in older))
    summary = json.loads(directory.summary.read_text())
    del summary["time_shares"], summary["profile"]
    directory.summary.write_text(json.dumps(summary))
    assert summarise(directory.path).step == 2
    longer = Run.from_config(
        stored_config.load(directory.config) | {"loop": stored_config.load(directory.config)["loop"] | {"max_steps": 4}}
    )
    assert longer.resume(directory).summary["step"] == 4
    assert ["forward_seconds" in row for row in rows(directory.path) if "loss" in row] == [False, False, True, True]


@pytest.mark.gpu
def test_a_gpu_is_timed_without_waiting_for_it() -> None:
    device = torch.device("cuda")
    stopwatch = StepTimer(device, lambda: 0.0, Profiler())
    matrix = torch.randn(4096, 4096, device=device)
    for number in range(4):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            stopwatch.start()
            for phase, products in (("forward", 10), ("backward", 20)):
                for _ in range(products):
                    torch.mm(matrix, matrix)
                stopwatch.mark(phase)
            stopwatch.finish()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        stopwatch.read()
        parts = stopwatch.take(1.0)
        if number:
            assert 1.5 < parts["backward"] / parts["forward"] < 2.7
        assert len(stopwatch._pool) == 3  # the events are used again
