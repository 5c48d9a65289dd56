"""Checkpoints written behind training's back hold the moment they were begun, and what goes wrong is reported."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint import snapshot as snapshot_module
from llmtrain.checkpoint import writer as module
from llmtrain.checkpoint.directory import find_checkpoints, step_of
from llmtrain.checkpoint.format import verify_checkpoint
from llmtrain.checkpoint.writer import Saver
from tests.checkpoint.test_policy import policy
from tests.helpers.host_memory import Registry

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


# --- the memory for copies ----------------------------------------------------------------------------------------


def open_saver(tmp_path: Path, registry: Registry) -> Saver:
    return Saver(policy(), tmp_path, CPU, config_text=CONFIG_TEXT, registration=registry)


def test_memory_for_copies_is_made_in_the_thread_and_the_first_save_waits_for_it(tmp_path: Path) -> None:
    held = threading.Event()
    registry = Registry(held=held)
    weight = {"w": torch.arange(100.0)}
    with open_saver(tmp_path, registry) as saver:
        assert saver.prepare(weight, {"w/m": weight["w"]}, is_copied=True) is None
        assert registry.calls == []  # it is not waited for
        threading.Timer(0.05, held.set).start()
        for step in (1, 2):
            save(saver, step, weight)
            saved = saver.collect(wait=True)
            assert saved is not None
            assert (saved.error, saved.notice) == (None, None)
        assert registry.calls == ["pin 448", "pin 448"]  # of both groups, once
        assert registry.threads == {"checkpoint"}
    assert steps(tmp_path) == [1, 2]
    assert registry.pinned == {}


def test_closing_waits_until_memory_is_made_and_gives_it_back(tmp_path: Path) -> None:
    held = threading.Event()
    registry = Registry(held=held)
    saver = open_saver(tmp_path, registry)
    saver.prepare({"w": torch.zeros(16)}, {}, is_copied=True)
    threading.Timer(0.05, held.set).start()
    saver.close()
    assert registry.calls == ["pin 64", "unpin 64"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_no_memory_is_made_for_a_run_that_saves_at_its_end_alone(tmp_path: Path, asynchronous: bool) -> None:
    registry = Registry()
    saver = Saver(policy(asynchronous=asynchronous), tmp_path, CPU, config_text=CONFIG_TEXT, registration=registry)
    with saver:
        saver.prepare({"w": torch.zeros(16)}, {}, is_copied=not asynchronous)
        saver.begin({"w": torch.zeros(16)}, {}, {"step": 1}, {}, copied=False)
        saver.collect(wait=True)
    assert registry.calls == []


def test_memory_that_is_not_pinned_is_reported_once_and_used(tmp_path: Path) -> None:
    weight = {"w": torch.zeros(100)}
    with open_saver(tmp_path, Registry("CUDA: out of memory")) as saver:
        saver.prepare(weight, {}, is_copied=True)
        notices = []
        for step in (1, 2):
            weight["w"].fill_(step)
            save(saver, step, weight)
            saver.before_update()
            weight["w"].fill_(-1)
            saved = saver.collect(wait=True)
            assert saved is not None
            assert (saved.error, saved.copied) == (None, True)
            notices.append(saved.notice)
    assert notices[0] is not None
    assert (
        "checkpoint.asynchronous=true: the host memory for a copy could not be pinned (CUDA: out of memory)"
        in notices[0]
    )
    assert notices[1] is None
    for path in find_checkpoints(tmp_path):
        assert load_file(path / "model.safetensors")["w"].unique().tolist() == [step_of(path)]


def test_training_waits_for_saves_where_the_system_has_no_memory_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(num_bytes: int, registration: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(snapshot_module, "HostMemory", no_memory)
    with open_saver(tmp_path, Registry()) as saver:
        saver.prepare({"w": torch.zeros(100)}, {}, is_copied=True)
        save(saver, 1, {"w": torch.zeros(100)})
        saved = saver.collect(wait=False)
        assert saved is not None
        assert (saved.error, saved.copied) == (None, False)
        assert "the system has none left (Cannot allocate memory)" in str(saved.notice)
        save(saver, 2, {"w": torch.zeros(100)})
        saved = saver.collect(wait=False)
        assert saved is not None
        assert saved.notice is None
    assert steps(tmp_path) == [1, 2]


def test_the_check_of_host_memory_is_for_the_exact_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = 18_700_000_000  # of GPT-2 1558M; in blocks of powers of two it would be 28.2 GB
    for available, has_room in ((copy + 1_100_000_000, True), (copy + 1_000_000_000, False)):
        monkeypatch.setattr(module, "available_memory", lambda available=available: available)
        with open_saver(tmp_path, Registry()) as saver:
            assert (saver.check_memory(copy) is None) is has_room
