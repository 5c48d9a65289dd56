"""Checkpoints written behind training's back hold the moment they were begun, and what goes wrong is reported."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint.directory import find_checkpoints, step_of
from llmtrain.checkpoint.format import verify_checkpoint
from llmtrain.checkpoint.writer import Saver
from tests.checkpoint.test_policy import policy

CPU = torch.device("cpu")
CONFIG_TEXT = "name: x\n"


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in find_checkpoints(folder)]


def save(saver: Saver, step: int, tensors: dict[str, torch.Tensor], losses: dict[int, float] | None = None) -> None:
    saver.begin(tensors, {"w/m": tensors["w"]}, {"step": step}, losses or {})


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_save_holds_the_moment_it_was_begun(tmp_path: Path, asynchronous: bool, device: str) -> None:
    """The tensors change as soon as they may; large enough for the copy to take a while."""
    weight = torch.zeros(3_000_000, device=device)
    with Saver(policy(asynchronous=asynchronous), tmp_path, torch.device(device), config_text=CONFIG_TEXT) as saver:
        for step in range(1, 6):
            weight.fill_(float(step))
            save(saver, step, {"w": weight})
            saver.before_update()
            weight.fill_(-1.0)
            saved = saver.collect(wait=True)
            assert saved is not None
            assert saved.error is None
            assert saved.step == step
            assert saved.held_seconds >= 0
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    for path in find_checkpoints(tmp_path):
        verify_checkpoint(path)
        for tensor in (
            *load_file(path / "model.safetensors").values(),
            *load_file(path / "optimizer.safetensors").values(),
        ):
            assert tensor.unique().tolist() == [step_of(path)]


def test_an_update_waits_for_the_whole_save_without_a_copy(tmp_path: Path) -> None:
    weight = torch.zeros(3_000_000)
    with Saver(policy(), tmp_path, CPU, config_text=CONFIG_TEXT) as saver:
        for step in range(1, 4):
            weight.fill_(float(step))
            saver.begin({"w": weight}, {"w/m": weight}, {"step": step}, {}, copied=False)
            saver.before_update()
            assert steps(tmp_path)[-1] == step
            weight.fill_(-1.0)
            saved = saver.collect(wait=False)
            assert saved is not None
            assert saved.error is None
            assert saved.held_seconds > 0
    for path in find_checkpoints(tmp_path):
        assert load_file(path / "model.safetensors")["w"].unique().tolist() == [step_of(path)]


def test_dtypes_shapes_and_values_survive_a_save(tmp_path: Path) -> None:
    tensors = {
        "w": torch.tensor(3.5),
        "half": torch.randn(3, 4).bfloat16(),
        "flags": torch.tensor([True, False]),
        "turned": torch.randn(5, 7).t(),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor(7, dtype=torch.int64),
        "nan": torch.tensor([float("nan"), 1.0]),
    }
    with Saver(policy(), tmp_path, CPU, config_text=CONFIG_TEXT) as saver:
        save(saver, 1, tensors)
        saved = saver.collect(wait=True)
    assert saved is not None
    assert saved.error is None
    loaded = load_file(tmp_path / "checkpoints" / "step-00000001" / "model.safetensors")
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(9), tensor.nan_to_num(9))


def test_older_checkpoints_are_removed_once_a_newer_one_is_written(tmp_path: Path) -> None:
    weight = {"w": torch.zeros(10)}
    with Saver(policy(keep_last=2, keep_best=1), tmp_path, CPU, config_text=CONFIG_TEXT) as saver:
        for step in range(1, 7):
            save(saver, step, weight, {1: 9.0, 2: 1.0, 3: 5.0, 4: 4.0})
            saved = saver.collect(wait=True)
    assert steps(tmp_path) == [2, 5, 6]
    assert saved is not None
    assert saved.removed == [4]


def test_a_damaged_checkpoint_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    weight = {"w": torch.zeros(10)}
    with Saver(policy(), tmp_path, CPU, config_text=CONFIG_TEXT) as saver:
        for step in (1, 2, 3):
            save(saver, step, weight)
            saver.collect(wait=True)
    (tmp_path / "checkpoints" / "step-00000003" / "config.yaml").write_text("name: y\n")
    with Saver(policy(keep_last=2), tmp_path, CPU, config_text=CONFIG_TEXT) as saver:  # as a resumed run would
        save(saver, 4, weight)
        saved = saver.collect(wait=True)
        assert saved is not None
        assert saved.removed == [1]
        assert ["step-00000003/config.yaml" in message for message in saved.damaged] == [True]
        save(saver, 5, weight)
        saved = saver.collect(wait=True)
        assert saved is not None
        assert (saved.removed, saved.damaged) == ([2], [])
    assert steps(tmp_path) == [3, 4, 5]


def test_an_error_is_reported_and_the_next_save_works(tmp_path: Path) -> None:
    weight = {"w": torch.zeros(10)}
    with Saver(policy(keep_last=1), tmp_path, CPU, config_text=CONFIG_TEXT) as saver:
        save(saver, 1, weight)
        saver.collect(wait=True)
        blocked = tmp_path / "checkpoints" / f".tmp-step-00000002-{os.getpid()}"
        blocked.write_text("a file where the folder should be")
        save(saver, 2, weight)
        saver.before_update()
        saved = saver.collect(wait=True)
        assert saved is not None
        assert isinstance(saved.error, FileExistsError)
        assert steps(tmp_path) == [1]
        blocked.unlink()
        save(saver, 3, weight)
        saved = saver.collect(wait=True)
        assert saved is not None
        assert saved.error is None
    assert steps(tmp_path) == [3]


def test_closing_the_saver_waits_for_the_save(tmp_path: Path) -> None:
    with Saver(policy(), tmp_path, CPU, config_text=CONFIG_TEXT) as saver:
        save(saver, 1, {"w": torch.zeros(5_000_000)})
    verify_checkpoint(tmp_path / "checkpoints" / "step-00000001")


def test_training_waits_for_the_save_without_memory_for_a_copy(tmp_path: Path) -> None:
    with Saver(policy(), tmp_path, CPU, config_text=CONFIG_TEXT) as saver:
        assert saver.check_memory(1000) is None
        warning = saver.check_memory(1 << 60)
        assert warning is not None
        assert "checkpoint.asynchronous=false" in warning
        save(saver, 1, {"w": torch.zeros(10)})
        saved = saver.collect(wait=False)
        assert saved is not None
        assert saved.error is None
