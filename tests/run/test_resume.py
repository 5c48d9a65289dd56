"""N steps are k steps, a resume and N - k steps, bit for bit.  That no kill makes a difference: tests/faults."""

import json
import signal
import time
from pathlib import Path

import pytest

from llmtrain import Run
from llmtrain.config import stored_config
from llmtrain.run.directory import RunDirectory
from tests.helpers.cli import TINY, assert_same_end, cut_back, llmtrain, only_run, rows, start
from tests.helpers.options import CONF, option_names

CHECKPOINTS = ("checkpoint.every_steps=1", "checkpoint.keep_last=0", "loop.max_steps=9")
TEXT = Path(__file__).parents[2] / "data" / "lighthouse.txt"
# 20 training sequences of 32 bytes: with 4 a step an epoch is 5 steps
SMALL_TEXT = ("data=text", "data.path=text.txt", "data.validation_fraction=0.1")


def write_text(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT.read_text()[:735])


def optimizer(name: str) -> tuple[str, ...]:
    """The option, with weights of this small model stored in few bits where it does that."""
    few_bits = "min_elements:" in (CONF / "optimizer" / f"{name}.yaml").read_text()
    return (f"optimizer={name}", *(("optimizer.min_elements=1000",) if few_bits else ()))


VARIANTS = {
    "plain": (),
    "dropout": ("model.dropout=0.2",),
    "unshuffled": ("data.shuffle=false",),
    "micro_batches": ("accumulation.batch_size=3", "accumulation.micro_batch_size=2"),
    "ramp": (
        "accumulation=ramp",
        "accumulation.micro_batch_size=2",
        "accumulation.stages=[{start:0,batch_size:2},{start:3,batch_size:4},{start:6,batch_size:5}]",
    ),
    "bf16": ("precision=bf16",),
    "fp16": ("precision=fp16", "precision.initial_scale=65536", "precision.growth_interval=2"),
    "untied": ("model.tie_embeddings=false", "model.qkv_bias=false"),
    "two_threads": ("runtime.num_threads=2", "model.dropout=0.2"),
    **{name: optimizer(name) for name in option_names("optimizer") if name != "adamw"},
    "looking": ("loop.eval_every=2", "loop.sample_every=3", "model.dropout=0.2"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    overrides = [o for o in TINY if not (variant == "ramp" and o.startswith("accumulation.batch_size"))]
    run = Run.compose(*overrides, *SMALL_TEXT, *CHECKPOINTS, *VARIANTS[variant], f"run_dir={tmp_path / 'whole'}")
    whole = run.train().run_dir
    for step in (2, 5, 7):  # mid-epoch, at an epoch's edge, in the second epoch
        copy = cut_back(whole, step, tmp_path / f"from-{step}")
        stored = Run.from_config(stored_config.load(copy / "config.yaml"))
        stored.resume(RunDirectory.open(copy))
        assert_same_end(whole, copy)
        numbers = [[r for r in rows(d) if "event" not in r] for d in (whole, copy)]
        for one, other in zip(*numbers, strict=True):
            for key in ("step", "tokens", "epoch", "loss", "learning_rate", "grad_norm", "val_loss"):
                assert one.get(key) == other.get(key)
        if variant == "looking":
            assert (whole / "samples.jsonl").read_text() == (copy / "samples.jsonl").read_text()


@pytest.mark.slow
def test_sigterm_saves_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    write_text(tmp_path)
    long = (*TINY, *SMALL_TEXT, "loop.max_steps=250", "checkpoint.every_steps=0")
    llmtrain("train", *long, "run_dir=whole", cwd=tmp_path)
    process = start("train", *long, "run_dir=stopped", cwd=tmp_path)
    wait_for_steps(tmp_path / "stopped", 20)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["exit_reason"] == "interrupted"
    assert 20 <= summary["step"] < 250
    assert "llmtrain resume" in output
    llmtrain("resume", "stopped", cwd=tmp_path)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    again = llmtrain("resume", "stopped", cwd=tmp_path).stdout
    assert "finished already, at step 250; to train on: llmtrain resume stopped loop.max_steps=500" in again


def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    """While the first is being obeyed, here in a step that takes long."""
    arguments = (
        "train", "model=tiny", "tokenizer=byte", "data.sequence_length=64", "loop.max_steps=3", "run_dir=run",
        "accumulation.batch_size=200000", "accumulation.micro_batch_size=16", "loop.eval_every=0",
    )  # fmt: skip
    process = start(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "train.log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it is finishing the step
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT


def wait_for_steps(run_dir: Path, step: int) -> int:
    """Wait until the run has logged ``step``; returns the newest step logged."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        logged = [json.loads(line) for line in lines if line.endswith("\n")]
        seen = max((row["step"] for row in logged if "loss" in row), default=0)
        if seen >= step:
            return seen
        time.sleep(0.02)
    raise AssertionError(f"{run_dir} did not reach step {step}")


def test_resume_shows_and_records_changes(tmp_path: Path) -> None:
    write_text(tmp_path)
    llmtrain("train", *TINY, *SMALL_TEXT, "loop.max_steps=3", "run_dir=run", cwd=tmp_path)
    done = llmtrain("resume", "run", "loop.max_steps=5", "optimizer.lr=1e-4", "schedule=constant", cwd=tmp_path)
    assert "optimizer.lr" in done.stdout
    assert "llmtrain.schedule.constant.Constant" in done.stdout
    (event,) = (row for row in rows(tmp_path / "run") if row.get("event") == "resume")
    assert event["step"] == 3
    assert ["loop.max_steps", 3, 5] in event["changes"]
    assert stored_config.load(tmp_path / "run" / "config.yaml")["optimizer"]["lr"] == 1e-4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 5


@pytest.mark.parametrize(
    "override", ["model.hidden_size=64", "tokenizer=gpt2", "data.sequence_length=16", "runtime.seed=5"]
)
def test_resume_refuses_changes_that_cannot_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    from llmtrain.cli.main import main

    run = Run.compose(*TINY, "loop.max_steps=1", f"run_dir={tmp_path / 'run'}")
    run.train()
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run"), override]) == 2
    message = capsys.readouterr().err
    assert override.split("=")[0] in message
    assert "cannot continue" in message


def test_a_moved_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory holds all that resuming needs: it may be moved, and conf/ is not read again."""
    monkeypatch.chdir(tmp_path)
    whole = Run.compose(*TINY, *CHECKPOINTS, f"run_dir={tmp_path / 'whole'}").train().run_dir
    moved = cut_back(whole, 4, tmp_path / "elsewhere" / "moved")
    assert only_run(tmp_path) == moved
    monkeypatch.setattr("llmtrain.config.folders._installed", lambda package, folder: tmp_path / "nowhere")
    Run.from_config(stored_config.load(moved / "config.yaml")).resume(RunDirectory.open(moved))
    assert_same_end(whole, moved)
