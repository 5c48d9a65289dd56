"""``llmtrain verify``: it passes on a good run, and names what is wrong with any other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmtrain import Run
from llmtrain.checkpoint.format import read_state, verify_checkpoint, write_checkpoint
from llmtrain.run.directory import RunDirectory
from llmtrain.verify.replay import inexactness_reason
from tests.helpers.cli import TINY, llmtrain

TEXT = Path(__file__).parents[2] / "data" / "lighthouse.txt"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    shutil.copy(TEXT, folder / "text.txt")
    llmtrain(
        "train", *TINY, "data=text", "data.path=text.txt", "data.cache_dir=cache", "data.validation_fraction=0.1",
        "model.dropout=0.1", "loop.max_steps=9", "checkpoint.every_steps=3", "loop.eval_every=3", "run_dir=run",
        cwd=folder,
    )  # fmt: skip
    return folder


def copy_of(good: Path, to: Path) -> Path:
    shutil.copytree(good, to, dirs_exist_ok=True)
    return to


def test_an_intact_run_is_verified_and_left_unchanged(good: Path) -> None:
    before = {path: path.read_bytes() for path in (good / "run").rglob("*") if path.is_file()}
    output = llmtrain("verify", "run", cwd=good).stdout
    assert "verified, bit for bit: a run resumed from its checkpoints repeats the original" in output
    assert "weights                   28     28" in output
    after = {path: path.read_bytes() for path in (good / "run").rglob("*") if path.is_file()}
    assert after.keys() - before.keys() <= {good / "run" / ".lock"}
    assert all(after[path] == content for path, content in before.items() if path.name != ".lock")


def test_a_device_is_the_same_under_the_name_of_an_earlier_version(good: Path, tmp_path: Path) -> None:
    """It wrote "1 threads"; a replay on another device is compared within a tolerance."""
    copy_of(good, tmp_path)
    directory, run = RunDirectory.open(tmp_path / "run"), Run.compose(*TINY)
    environment = directory.environment.read_text()
    assert environment.count(', 1 thread"') == 1
    with run.runtime.session() as device:
        directory.environment.write_text(environment.replace(', 1 thread"', ', 1 threads"'))
        assert inexactness_reason(run, directory, device) is None
        directory.environment.write_text(environment.replace(', 1 thread"', ', 11 threads"'))
        assert "11 threads, this is" in str(inexactness_reason(run, directory, device))


def test_a_changed_byte_is_named(good: Path, tmp_path: Path) -> None:
    copy_of(good, tmp_path)
    victim = tmp_path / "run" / "checkpoints" / "step-00000009" / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    done = llmtrain("verify", "run", cwd=tmp_path, check=1)
    assert "step-00000009/optimizer.safetensors: its sha256" in done.stdout
    assert "replaying" not in done.stdout


def test_weights_that_do_not_follow_from_the_checkpoint_before_are_named(good: Path, tmp_path: Path) -> None:
    """A checkpoint that is whole, but not what training came to: another program's, or a bug's."""
    copy_of(good, tmp_path)
    path = tmp_path / "run" / "checkpoints" / "step-00000009"
    model, optimizer = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    name = next(name for name in sorted(model) if "weight" in name)
    model[name] = model[name] * (1 + 1e-6)
    config = (path / "config.yaml").read_text()
    write_checkpoint(path, model=model, optimizer=optimizer, state=read_state(path), config=config)
    verify_checkpoint(path)
    done = llmtrain("verify", "run", cwd=tmp_path, check=1)
    assert f"failed: weights {name}: differs by" in done.stdout


def test_changed_data_are_named(good: Path, tmp_path: Path) -> None:
    copy_of(good, tmp_path)
    (tmp_path / "text.txt").write_text(TEXT.read_text().replace("lighthouse", "Lighthouse"))
    assert "data: not what this run was started on" in llmtrain("verify", "run", cwd=tmp_path, check=1).stdout


def change_row(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the metrics row of step 9."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["step"] == 9 and "loss" in row:
            change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_recorded_loss_that_is_not_reproduced_is_named(good: Path, tmp_path: Path) -> None:
    copy_of(good, tmp_path)
    change_row(tmp_path / "run", lambda row: row.update(loss=row["loss"] + 1e-6))
    assert "failed: step 9: loss" in llmtrain("verify", "run", cwd=tmp_path, check=1).stdout


def test_a_row_without_its_rate_is_named(good: Path, tmp_path: Path) -> None:
    copy_of(good, tmp_path)
    change_row(tmp_path / "run", lambda row: row.pop("learning_rate"))
    stdout = llmtrain("verify", "run", cwd=tmp_path, check=1).stdout
    assert "failed: step 9: learning_rate" in stdout
    assert "none recorded" in stdout


def test_replay_steps_limits_the_replay(good: Path, tmp_path: Path) -> None:
    copy_of(good, tmp_path)
    partly = llmtrain("verify", "run", "replay_steps=1", cwd=tmp_path).stdout
    assert "replaying 1 step from step 6" in partly
    assert "tensors not" in partly
    assert "replaying" not in llmtrain("verify", "run", "replay_steps=0", cwd=tmp_path).stdout
    one = llmtrain("verify", "run/checkpoints/step-00000009", cwd=tmp_path).stdout
    assert "intact" in one
    assert "replaying" not in one


def test_a_replay_without_a_logged_step_proves_nothing(good: Path, tmp_path: Path) -> None:
    copy_of(good, tmp_path)
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if row["step"] != 7]  # as metrics.log_every=8 would have it
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    done = llmtrain("verify", "run", "replay_steps=1", cwd=tmp_path, check=2)
    assert "replay_steps=1: none of them was logged" in done.stderr
    assert "replay_steps=null, or replay_steps=2" in done.stderr
    assert "tensors not" in llmtrain("verify", "run", "replay_steps=2", cwd=tmp_path).stdout
    assert "weights.path=else: this" in llmtrain("verify", "run", "base=else", cwd=tmp_path, check=2).stderr


def test_a_single_checkpoint_is_verified_from_the_start_of_the_run(good: Path, tmp_path: Path) -> None:
    copy_of(good, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert "replaying 9 steps from the start" in llmtrain("verify", "run", cwd=tmp_path).stdout


def test_mistakes_are_named(good: Path, tmp_path: Path) -> None:
    copy_of(good, tmp_path)
    assert "no such run directory" in llmtrain("verify", "nowhere", cwd=tmp_path, check=2).stderr
    assert "replay_steps=-1" in llmtrain("verify", "run", "replay_steps=-1", cwd=tmp_path, check=2).stderr
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "no checkpoint yet" in llmtrain("verify", "run", cwd=tmp_path, check=2).stderr
