"""Whole runs on a GPU, through the real command: exact resume, compiling, graphs, micro-batches, text, the plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import assert_same_end, rows

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
RUN = (
    "model=gpt30m", "data=python_docs", "data.sequence_length=256", "accumulation.batch_size=8",
    "accumulation.micro_batch_size=8", "loop.eval_every=0", "loop.sample_every=0", "metrics.log_every=1",
    "checkpoint.every_steps=0", "runtime.compile=false", "runtime.device=cuda", "schedule=constant",
)  # fmt: skip
DETERMINISTIC = (
    "runtime.deterministic=true",
    "model.dropout=0.1",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=0",
)


def llmtrain(*arguments: str) -> str:
    """Run the command in a process that is started, not forked: a fork of one that has seen the GPU cannot use it."""
    command = [sys.executable, "-m", "llmtrain", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(folder: Path, name: str, *overrides: str) -> Path:
    run_dir = folder / name
    llmtrain("train", *RUN, *overrides, f"run_dir='{run_dir}'")
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir) if "loss" in row and "event" not in row]


@pytest.mark.parametrize("more", [(), ("runtime.compile=true",)], ids=["eager", "compiled"])
def test_resumed_run_ends_with_the_same_bits(more: tuple[str, ...], tmp_path: Path) -> None:
    whole = train(tmp_path, "whole", *DETERMINISTIC, *more, "loop.max_steps=6")
    resumed = train(tmp_path, "resumed", *DETERMINISTIC, *more, "loop.max_steps=3")
    llmtrain("resume", str(resumed), "loop.max_steps=6")
    assert losses(resumed) == losses(whole)
    assert_same_end(whole, resumed)


def test_verify_proves_the_resume_of_a_deterministic_run(tmp_path: Path) -> None:
    run_dir = train(tmp_path, "run", *DETERMINISTIC, "loop.max_steps=6")
    done = llmtrain("verify", str(run_dir))
    assert "verified, bit for bit" in done


@pytest.mark.parametrize("micro_batch_size", [8, 4])
@pytest.mark.parametrize("graphs", [False, True], ids=["compiled", "graphs"])
def test_compiled_runs_learn_as_an_eager_one(graphs: bool, micro_batch_size: int, tmp_path: Path) -> None:
    """The losses of the first steps in fp32, with an evaluation between them, and the same again after a resume."""
    same = ("precision=fp32", "loop.max_steps=6", f"accumulation.micro_batch_size={micro_batch_size}",
            "loop.eval_every=3", "loop.eval_batches=1")  # fmt: skip
    eager = train(tmp_path, "eager", *same)
    compiled = train(tmp_path, "compiled", *same, "runtime.compile=true", f"runtime.cuda_graphs={str(graphs).lower()}")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)


def test_auto_finds_a_micro_batch_that_fits_without_halving_it(tmp_path: Path) -> None:
    auto = ("accumulation=auto", "accumulation.batch_size=4096", "data.sequence_length=1024", "loop.max_steps=2")
    run_dir = train(tmp_path, "auto", *auto)
    events = [row for row in rows(run_dir) if row.get("event") in ("micro_batch", "out_of_memory")]
    assert [event["event"] for event in events] == ["micro_batch"]
    assert len(losses(run_dir)) == 2


def test_text_is_generated_and_repeatable(tmp_path: Path) -> None:
    run_dir = train(tmp_path, "run", "loop.max_steps=2", "loop.sample_every=1")
    texts = [llmtrain("generate", str(run_dir), "max_tokens=300", "prompt=The") for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > len("The\n")


@pytest.mark.parametrize("more", [(), ("activation_checkpointing=full",), ("optimizer=adamw_8bit",)], ids=str)
def test_plan_estimates_the_measured_memory(more: tuple[str, ...], tmp_path: Path) -> None:
    sizes = ("data.sequence_length=512", "accumulation.batch_size=32", "accumulation.micro_batch_size=32", *more)
    run_dir = train(tmp_path, "run", *sizes, "loop.max_steps=4")
    measured = max(row["memory_bytes"] for row in rows(run_dir) if "memory_bytes" in row)
    plan = tmp_path / "plan.json"
    llmtrain("plan", *RUN, *sizes, "loop.max_steps=4", "probe=false", f"json='{plan}'")
    assert json.loads(plan.read_text())["estimated_peak_bytes"] == pytest.approx(measured, rel=0.1)
