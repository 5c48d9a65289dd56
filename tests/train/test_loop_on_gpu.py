"""A training step on a GPU: the host never waits, and memory that runs out makes the micro-batch smaller."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.workers.our_loop import open_loop
from llmtrain import Run
from llmtrain.config.assemble import assemble
from llmtrain.train.loop import Loop

pytestmark = pytest.mark.gpu
MODEL = (
    "model=gpt30m", "data=python_docs", "data.sequence_length=256", "accumulation.batch_size=8",
    "accumulation.micro_batch_size=4", "loop.max_steps=1000", "loop.eval_every=0", "loop.sample_every=0",
    "checkpoint.every_steps=0", "metrics.log_every=1000", "runtime.compile=false",
)  # fmt: skip


@pytest.fixture
def all_memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def train(folder: Path, steps: int, *overrides: str, synchronises: bool = True) -> Loop:
    """Some steps of a run, the first two with waits."""
    run = Run.compose(*MODEL, *overrides)
    with run.runtime.session() as device:
        run.runtime.seed_everything()
        parts = assemble(run, device)
        with open_loop(run, parts, folder / "run") as loop:
            for _ in range(2):
                loop.advance()
            torch.cuda.synchronize()
            try:
                torch.cuda.set_sync_debug_mode("default" if synchronises else "error")
                for _ in range(steps):
                    loop.advance()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    return loop


@pytest.mark.parametrize(
    "override",
    ["precision=bf16", "precision=fp16", "optimizer=adamw_8bit", "optimizer=adamw_bf16", "optimizer=lion",
     "optimizer=sgd", "clipping=none", "clipping=value", "clipping=per_parameter", "recovery=off", "model.dropout=0.1",
     "activation_checkpointing=selective"],
)  # fmt: skip
def test_step_never_waits_for_the_device(override: str, tmp_path: Path) -> None:
    loop = train(tmp_path, 3, override, synchronises=False)
    assert loop.state.step == 5


def test_micro_batch_is_halved_when_memory_runs_out(tmp_path: Path, all_memory: None) -> None:
    """A limit of this process, far below what a step of all sequences takes, and above what one takes."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(4e9 / total)
    loop = train(tmp_path, 2, "accumulation.batch_size=512", "accumulation.micro_batch_size=512")
    assert 1 <= loop.step.micro_batch_size < 512
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    halved = [row["micro_batch_size"] for row in rows if row.get("event") == "out_of_memory"]
    assert halved == sorted(halved, reverse=True)
    assert halved[-1] == loop.step.micro_batch_size
    assert loop.state.step == 4


def test_losses_on_a_gpu_are_those_of_a_cpu(tmp_path: Path) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        short = ("precision=fp32", f"runtime.device={device}", "loop.max_steps=4", "metrics.log_every=1")
        Run.compose(*MODEL, *short, f"run_dir='{tmp_path / device}'").train()
        rows = [json.loads(line) for line in (tmp_path / device / "metrics.jsonl").read_text().splitlines()]
        ends.append([row["loss"] for row in rows if "loss" in row and "event" not in row])
    # initial weights are drawn on the device, from its own generator: the same distribution, not the same numbers
    assert ends[1] == pytest.approx(ends[0], rel=0.02)
