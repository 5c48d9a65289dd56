"""The policy of saving and keeping checkpoints, and the choice of the one to continue from."""

from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.format import write_checkpoint
from llmtrain.checkpoint.policy import Checkpoint
from llmtrain.checkpoint.restore import newest_intact


def policy(**changes: float) -> Checkpoint:
    values = {
        "every_steps": 0, "every_minutes": 0, "before_evaluation": True, "asynchronous": True, "keep_last": 0,
        "keep_best": 0, "keep_every": 0,
    }  # fmt: skip
    return Checkpoint(**(values | changes))


def test_a_save_is_due_by_steps_or_minutes() -> None:
    by_steps = policy(every_steps=50)
    assert [step for step in range(1, 160) if by_steps.is_due(step, 1e9)] == [50, 100, 150]
    by_time = policy(every_minutes=0.5)
    assert not by_time.is_due(50, 29.9)
    assert by_time.is_due(51, 30.0)
    both = policy(every_steps=50, every_minutes=1)
    assert both.is_due(50, 0.0)
    assert both.is_due(7, 61.0)
    assert not policy().is_due(50, 1e9)


def test_a_run_may_copy_for_saves_before_its_end() -> None:
    by_steps = policy(every_steps=50)
    assert by_steps.copies_between(0, 51)
    assert not by_steps.copies_between(0, 50)  # the last one is waited for
    assert not by_steps.copies_between(50, 100)
    assert by_steps.copies_between(50, 101)
    assert policy(every_minutes=5).copies_between(0, 10)
    assert not policy().copies_between(0, 1000)
    assert not policy(every_steps=50, every_minutes=5, asynchronous=False).copies_between(0, 1000)


def test_a_save_is_due_ahead_of_an_evaluation() -> None:
    default = policy()
    assert default.is_due_ahead(0.0, 0.0)  # the first one
    assert default.is_due_ahead(0.0, 0.99)
    assert not default.is_due_ahead(19.9, 2.0)
    assert default.is_due_ahead(20.0, 2.0)
    assert not policy(before_evaluation=False).is_due_ahead(1e9, 0.0)


LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.2, 50: 4.0}


@pytest.mark.parametrize(
    ("changes", "removed"),
    [
        ({}, set()),
        ({"keep_last": 2}, {10, 20, 30, 40}),
        ({"keep_last": 1, "keep_best": 2}, {10, 30, 50}),
        ({"keep_last": 2, "keep_best": 1}, {10, 30, 40}),
        ({"keep_last": 1, "keep_every": 30}, {10, 20, 40, 50}),
        ({"keep_last": 100}, set()),
    ],
)
def test_all_but_the_last_and_the_best_are_removed(changes: dict[str, int], removed: set[int]) -> None:
    assert policy(**changes).superfluous([10, 20, 30, 40, 50, 60], LOSSES) == removed


def test_damaged_checkpoints_do_not_count_as_kept() -> None:
    """``superfluous`` is asked about whole checkpoints alone: of 10, 20 and 30, where 30 is damaged, 10 stays."""
    assert policy(keep_last=2).superfluous([10, 20], {}) == set()


@pytest.mark.parametrize("key", ["every_steps", "every_minutes", "keep_last", "keep_best", "keep_every"])
def test_negative_values_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=-1: must not be negative"):
        policy(**{key: -1})


def test_the_newest_intact_checkpoint_is_found(tmp_path: Path) -> None:
    paths = []
    for step in (1, 2, 3, 4):
        paths.append(tmp_path / f"step-{step:08d}")
        tensors = {"w": torch.full((10,), float(step))}
        write_checkpoint(paths[-1], model=tensors, optimizer={}, state={"step": step}, config="")
    (paths[3] / "state.json").write_text("{}")
    (paths[2] / "model.safetensors").unlink()
    found, errors = newest_intact(paths)
    assert found == paths[1]
    assert [step_of(paths[3]), step_of(paths[2])] == [4, 3]
    assert ["state.json" in str(errors[0]), "model.safetensors: missing" in str(errors[1])] == [True, True]
    assert newest_intact(paths, at_most=1) == (paths[0], [])
    assert newest_intact(paths, at_most=0) == (None, [])
    assert newest_intact(paths, known=paths) == (paths[3], [])
