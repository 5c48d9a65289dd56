"""What a run finds out at its start."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain import Run
from llmtrain.config.assemble import Parts, assemble
from llmtrain.data import Rows
from llmtrain.metrics import read_metrics
from llmtrain.objective.causal import CausalUnit
from llmtrain.run.autotune import largest_that_fits
from llmtrain.run.session import fits, tune
from llmtrain.train.state import TrainState
from llmtrain.train.step import Step
from tests.helpers.cli import llmtrain

TINY = ("model=tiny", "tokenizer=byte", "loop.sample_every=0", "metrics.log_every=1")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")


def of_run(run_dir: Path, event: str) -> list[dict]:
    return [row for row in read_metrics(run_dir / "metrics.jsonl") if row.get("event") == event]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row and "event" not in row]


@pytest.mark.parametrize(
    ("batch_size", "room", "expected"),
    [
        (8, 8, 8),
        (8, 100, 8),
        (8, 7, 4),
        (8, 1, 1),
        (12, 5, 4),
        (12, 6, 6),
        (10, 7, 5),
        (48, 20, 16),
        (1, 1, 1),
        (7, 3, 3),
    ],
)
def test_the_largest_micro_batch_that_fits_is_found(batch_size: int, room: int, expected: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    assert largest_that_fits(batch_size, fits) == expected
    assert tried[0] == batch_size
    fewest = min(-(-batch_size // size) for size in range(1, room + 1))
    assert -(-batch_size // expected) == fewest


def test_no_micro_batch_is_found_where_none_fits() -> None:
    assert largest_that_fits(5, lambda size: False) is None


def assembled(*overrides: str) -> tuple[Run, Parts]:
    run = Run.compose(*TINY, *overrides)
    return run, assemble(run, torch.device("cpu"))


def step_of(parts: Parts) -> Step:
    return Step(parts.unit, parts.optimizer, parts.precision, 4)


@pytest.mark.parametrize(("setting", "is_compiled"), [("auto", True), ("false", False)])
def test_the_loss_is_compiled_where_there_is_a_gpu_unless_compiling_is_off(setting: str, is_compiled: bool) -> None:
    run, parts = assembled(f"runtime.compile={setting}")
    tune(run, parts, step_of(parts), TrainState(), 1e12)
    assert isinstance(parts.unit, CausalUnit)
    assert parts.unit.chunking.is_compiled == is_compiled


def test_auto_takes_all_at_once_where_there_is_room(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    same = ("loop.max_steps=2", "loop.eval_every=0", "runtime.num_threads=1")
    done = llmtrain("train", *TINY, "accumulation=auto", "accumulation.batch_size=6", *same, f"run_dir={run_dir}",
                    cwd=tmp_path)  # fmt: skip
    assert "6 of 6 sequences at once" in done.stdout
    (event,) = of_run(run_dir, "micro_batch")
    assert event["micro_batch_size"] == 6
    fixed = tmp_path / "fixed"
    llmtrain("train", *TINY, "accumulation.batch_size=6", "accumulation.micro_batch_size=6", *same,
             f"run_dir={fixed}", cwd=tmp_path)  # fmt: skip
    assert losses(run_dir) == losses(fixed)


def test_resume_keeps_the_micro_batch_that_auto_found(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = (*TINY, "accumulation=auto", "accumulation.batch_size=6", "loop.eval_every=0")
    Run.compose(*overrides, "loop.max_steps=2", f"run_dir={run_dir}").train()
    state = next(iter(sorted((run_dir / "checkpoints").iterdir()))) / "state.json"
    assert json.loads(state.read_text())["micro_batch_size"] == 6
    llmtrain("resume", str(run_dir), "loop.max_steps=4", cwd=tmp_path)
    assert len(of_run(run_dir, "micro_batch")) == 1


def test_less_memory_means_smaller_micro_batches() -> None:
    run, parts = assembled("accumulation=auto", "accumulation.batch_size=4096", "model.context_length=512",
                           "data.sequence_length=512", "model.hidden_size=256")  # fmt: skip
    assert not fits(run, parts, 1 << 20)  # a million sequences of 512 tokens: some TB
    assert fits(run, parts, 1)


def test_auto_does_not_compile_a_short_run() -> None:
    run, parts = assembled("loop.max_steps=5")
    state = TrainState()
    events = tune(run, parts, step_of(parts), state, peak_flops=1e12)
    assert state.compiled is False
    assert parts.unit.model.compiled_blocks is None
    assert events == []


@pytest.mark.gpu
def test_a_size_found_on_a_gpu_fits_and_the_peak_is_that_of_the_run(tmp_path: Path) -> None:
    total, limit = torch.cuda.get_device_properties(0).total_memory, 3 << 30
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        run_dir = tmp_path / "run"
        Run.compose(*TINY, "model=laptop_gpt2", "precision=bf16", "accumulation=auto", "accumulation.batch_size=2048",
                    "loop.max_steps=3", "loop.eval_every=3", f"run_dir={run_dir}").train()  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (event,) = of_run(run_dir, "micro_batch")
    assert 1 < event["micro_batch_size"] < 2048
    assert not of_run(run_dir, "out_of_memory")
    peaks = [row["memory_bytes"] for row in read_metrics(run_dir / "metrics.jsonl") if "memory_bytes" in row]
    assert max(peaks) < limit


@needs_compiler
@pytest.mark.slow
def test_resume_keeps_the_decision_to_compile() -> None:
    # The shapes of tests/test_runtime.py, so that what was compiled for one of them is there for the other
    shapes = ("data.sequence_length=32", "accumulation.batch_size=4", "accumulation.micro_batch_size=4")
    run, parts = assembled("loop.max_steps=5", "precision=fp32", *shapes)
    state = TrainState(compiled=True)  # of a run that goes on from where a GPU left it, say
    events = tune(run, parts, step_of(parts), state, peak_flops=1e15)
    assert [event["event"] for event in events] == ["compiled"]
    assert state.compiled is True
    ids = torch.randint(0, 256, (4, 32)).numpy()
    batch = run.objective.collate(Rows(ids, ids), np.arange(4), 0)
    compiled = parts.unit(batch)["next_token"]
    with parts.unit.eager():
        torch.testing.assert_close(compiled, parts.unit(batch)["next_token"], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.compile=yes please", "runtime.compile=yes please: must be auto, true or false"),
        ("runtime.cuda_graphs=true", "runtime.cuda_graphs=true: needs compile=true, not compile=auto"),
        (
            "runtime.cuda_graphs=true runtime.compile=true activation_checkpointing=full "
            "activation_checkpointing.offload=true",
            "runtime.cuda_graphs=true: does not go with activation_checkpointing.offload=true",
        ),
        ("accumulation=auto accumulation.batch_size=0", "accumulation.batch_size=0"),
    ],
)
def test_impossible_settings_are_refused(override: str, message: str, tmp_path: Path) -> None:
    settings = [override] if "please" in override else override.split(" ")
    done = llmtrain("train", *TINY, *settings, cwd=tmp_path, check=2)
    assert message in done.stderr
