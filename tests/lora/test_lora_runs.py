"""Runs that train adapters, through the command line: small checkpoints, exact resume, adapters to start from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain import Run
from llmtrain.config.assemble import assemble
from llmtrain.lint import Case, lint
from tests.helpers.cli import TINY, assert_same_end, cut_back, llmtrain, only_run, rows

STEPS = ("checkpoint.every_steps=3", "loop.max_steps=6", "checkpoint.keep_last=0", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights are adapted."""
    folder = tmp_path_factory.mktemp("base")
    Run.compose(*TINY, "loop.max_steps=5", f"output_dir={folder}", "name=base").train()
    return only_run(folder)


def adapting(base: Path, folder: Path, *overrides: str) -> tuple[str, ...]:
    return (*TINY, *STEPS, "weights=checkpoint", f"weights.path={base}", f"output_dir={folder}", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora=lora", "lora.dropout=0.1"),
        ("lora=dora", "lora.quantization=nf4", "lora.also_train=[norm]"),
        ("lora=rslora", "lora.quantization=int8", "lora.targets=[qkv,embeddings]", "activation_checkpointing=full"),
    ],
)
def test_resume_is_exact(overrides: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    if "lora.quantization" in " ".join(overrides):
        pytest.importorskip("bitsandbytes")
    whole = Run.compose(*adapting(base, tmp_path, *overrides, "run_dir=" + str(tmp_path / "whole"))).train().run_dir
    half = cut_back(whole, 3, tmp_path / "half")
    llmtrain("resume", str(half), cwd=tmp_path)
    assert_same_end(whole, half)
    losses = [row["loss"] for row in rows(whole) if "loss" in row]
    assert losses[-1] < losses[0]

    full, checkpoint = base / "checkpoints" / "step-00000005", whole / "checkpoints" / "step-00000006"
    tensors = load_file(checkpoint / "model.safetensors")
    assert all("lora_" in name or "norm" in name for name in tensors)
    sizes = [(path / "model.safetensors").stat().st_size for path in (checkpoint, full)]
    assert sizes[0] < sizes[1] / 2  # of a model this small


def test_a_run_with_adapters_verifies_and_names_its_base(base: Path, tmp_path: Path) -> None:
    done = llmtrain("train", *adapting(base, tmp_path, "lora=lora", "lora.rank=4"), cwd=tmp_path)
    trained = sum(4 * (rows + columns) for rows, columns in ((96, 32), (32, 32), (128, 32), (32, 128))) * 2
    assert f"{trained:,} of " in done.stdout
    assert "; lora, rank 4, alpha 16, on all-linear" in done.stdout
    assert f"checkpoint, {base}" in done.stdout
    llmtrain("verify", str(only_run(tmp_path)), cwd=tmp_path)


def test_verify_takes_a_base_that_was_moved(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    run = Run.compose(*adapting(tmp_path / "base", tmp_path / "runs", "lora=lora")).train().run_dir
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    failed = llmtrain("verify", str(run), cwd=tmp_path, check=2)
    assert "weights.path=DIR" in failed.stderr
    assert "bit for bit" in llmtrain("verify", str(run), "weights.path=elsewhere", cwd=tmp_path).stdout


def test_a_plan_counts_the_adapters_alone(base: Path, tmp_path: Path) -> None:
    overrides = adapting(base, tmp_path, "lora=lora", "lora.rank=4")
    llmtrain("plan", *overrides, "probe=false", f"json={tmp_path / 'plan.json'}", cwd=tmp_path)
    planned = json.loads((tmp_path / "plan.json").read_text())["checkpoint_bytes"]
    llmtrain("train", *overrides, cwd=tmp_path)
    folder = only_run(tmp_path) / "checkpoints" / "step-00000006"
    tensors = sum((folder / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    assert planned < tensors < planned + 40_000  # the files' own headers


def test_a_run_starts_from_the_adapters_of_another(base: Path, tmp_path: Path) -> None:
    keys = ("lora=lora", "lora.rank=4", "lora.alpha=32", "lora.targets=[qkv]")
    first = Run.compose(*adapting(base, tmp_path, *keys, f"run_dir={tmp_path / 'first'}")).train()
    again = f"lora.path={first.run_dir}"
    run = Run.compose(*adapting(base, tmp_path, *keys, again, f"run_dir={tmp_path / 'second'}", "loop.max_steps=1"))
    parts = assemble(run, torch.device("cpu"))
    trained = {name: p for name, p in first.model.named_parameters() if p.requires_grad}
    there = dict(parts.unit.named_weights())
    assert trained
    assert all(torch.equal(there[name], parameter) for name, parameter in trained.items())

    for changes, message in (
        (("lora.rank=8",), "lora.rank=8: the adapters of .* have 4; lora.rank=4"),
        (("lora.alpha=3",), "lora.alpha=3: the adapters of .* have 32"),
        (("lora=rslora",), "lora=rslora: the adapters of .* are of another kind; lora=lora"),
        (("lora.targets=[qkv,up]",), "does not fit lora.targets and lora.also_train: blocks.0.mlp.up.lora_A"),
        ((f"lora.path={base}",), "holds a whole model, no adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble(Run.compose(*adapting(base, tmp_path, *keys, again, *changes)), torch.device("cpu"))
    shutil.rmtree(first.run_dir)
    with pytest.raises(ValueError, match="no such directory"):
        assemble(run, torch.device("cpu"))


def test_adapters_as_large_as_their_matrices_are_reported(base: Path, tmp_path: Path) -> None:
    keys = adapting(base, tmp_path, "lora=lora", "lora.targets=[all-linear]")

    def found(rank: int) -> dict[str, str]:
        run = Run.compose(*keys, f"lora.rank={rank}")
        findings = lint(Case.of(run, assemble(run, torch.device("cpu")), run.overrides))
        return {finding.key: finding.message for finding in findings}

    message = found(20)["lora.rank"]  # qkv: 20 * (96 + 32) < 96 * 32; projection: 20 * (32 + 32) >= 32 * 32
    assert "2 of 8 adapters have as many parameters as the matrix that they change, or more" in message
    assert "blocks.0.attention.projection" in message
    assert message.endswith("; lora.rank=8")
    assert "lora.rank" not in found(15)


def test_a_mistake_is_reported_in_one_line(base: Path, tmp_path: Path) -> None:
    done = llmtrain("train", *adapting(base, tmp_path, "lora=lora", "lora.targets=[W_pack]"), cwd=tmp_path, check=2)
    assert "lora.targets[0]=W_pack: names no layer of this model" in done.stderr
    assert "attention.qkv" in done.stderr
    assert not list(tmp_path.glob("*/*/config.yaml"))


def test_a_run_from_before_adapters_resumes(base: Path, tmp_path: Path) -> None:
    """An older version wrote another name for the class of lora=none."""
    old = cut_back(base, 5, tmp_path / "old")
    path = old / "config.yaml"
    text = path.read_text()
    assert "llmtrain.lora.none.NoLora" in text
    path.write_text(text.replace("llmtrain.lora.none.NoLora", "llmtrain.lora.NoLora"))
    done = llmtrain("resume", str(old), "loop.max_steps=6", cwd=tmp_path)
    assert "lora" not in done.stdout
    assert json.loads((old / "summary.json").read_text())["step"] == 6
