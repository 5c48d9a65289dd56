"""Damaged checkpoints: each is noticed and named; a resumed run passes over it, aloud, and ends as it would have."""

import random
import shutil
from pathlib import Path

import pytest

from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.format import verify_checkpoint
from tests.faults.damage import Damage, absences, flips, names_the_place, truncations
from tests.faults.victims import (
    FILES,
    STANDARD,
    assert_all_whole,
    assert_log_whole,
    assert_same_rows,
    events,
    files_of,
    hold_in_a_save,
    steps,
    wait_for,
)
from tests.helpers.cli import assert_same_end
from tests.helpers.launcher import Launcher
from tests.helpers.sharding import shard_run


@pytest.fixture(scope="session")
def interrupted(server: Launcher) -> Path:
    """A run of which half is done, with checkpoints of the steps 20, 30 and 40."""
    keep = ("checkpoint.every_steps=10", "checkpoint.keep_last=3", "checkpoint.before_evaluation=false")
    server.run("train", *STANDARD, *keep, "loop.max_steps=40", "run_dir=half")
    assert steps(server.folder / "half") == [20, 30, 40]
    return server.folder / "half"


def flip(name: str) -> Damage:
    return Damage("flip", name, place=200, bit=3)


def contents(run: Path) -> dict[Path, bytes]:
    """Every file of a run but its lock, which any process that opens the run writes."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_every_kind_of_damage_is_found_and_named(interrupted: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(interrupted / "checkpoints" / "step-00000040", tmp_path / "step-00000040"))
    damages = [*flips(checkpoint, 25, random.Random("flips")), *truncations(checkpoint), *absences()]
    assert len(damages) == 5 * 25 + 5 * 11 + 13
    for damage in damages:
        with damage.done(checkpoint):
            with pytest.raises(CheckpointError) as caught:
                verify_checkpoint(checkpoint)
            assert names_the_place(str(caught.value), damage, checkpoint), f"{damage}: {caught.value}"
    verify_checkpoint(checkpoint)


def test_every_kind_of_damage_of_a_sharded_checkpoint_is_found_and_named(interrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy = run / "checkpoints" / "step-00000040"
    shutil.copytree(interrupted / "checkpoints" / copy.name, copy)
    shard_run(run, 2)
    assert_all_whole(run)
    damages = [*flips(copy, 25, random.Random("flips")), *truncations(copy), *absences(files_of(copy))]
    assert len(damages) == 8 * 25 + 8 * 11 + 19
    for damage in damages:
        with damage.done(copy):
            with pytest.raises(CheckpointError) as caught:
                verify_checkpoint(copy)
            assert names_the_place(str(caught.value), damage, copy), f"{damage}: {caught.value}"
    verify_checkpoint(copy)


@pytest.mark.slow
def test_a_run_with_damaged_checkpoints_resumes_to_the_same_end(
    launcher: Launcher, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed five times; each time another file of the newest checkpoint is damaged, at last of the two newest."""
    run = tmp_path / "run"
    keep = ("checkpoint.every_steps=1", "checkpoint.keep_last=3")
    victim = launcher.start("train", *STANDARD, *keep, "run_dir=run")
    for number, name in enumerate(FILES, start=1):
        assert hold_in_a_save(victim, run, after=10 * number)
        victim.kill()
        older, *damaged = steps(run)[-3:] if number == len(FILES) else steps(run)[-2:]
        for step in damaged:
            flip(name).do(run / "checkpoints" / f"step-{step:08d}")
        victim = launcher.start("resume", "run")
        resumes = wait_for(
            "the resume", lambda: len(found := events(run, "resume")) == number and found, victim  # noqa: B023
        )  # fmt: skip
        assert resumes[-1]["step"] == older
        told = " ".join(row["message"] for row in events(run, "damaged"))
        for place in (f"checkpoints/step-{step:08d}/{name}" for step in damaged):
            assert all(place in text for text in (told, victim.text(), (run / "train.log").read_text())), place
    victim.wait(0)
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_all_whole(run)
    assert_log_whole(run)


@pytest.mark.slow
def test_a_named_checkpoint_that_is_damaged_is_refused(launcher: Launcher, interrupted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    named = "run/checkpoints/step-00000040"
    flip("model.safetensors").do(tmp_path / named)
    before = contents(run)
    for arguments, status in (
        (("resume", "run", "checkpoint.step=40", "loop.max_steps=80"), 2),
        (("generate", named), 2),
        (("train", *STANDARD, "weights=checkpoint", f"weights.path={named}", "run_dir=new"), 2),
        (("verify", named), 1),
    ):
        output = launcher.run(*arguments, status=status)
        assert f"{named}/model.safetensors: its sha256" in output
        assert "Traceback" not in output
    assert not (tmp_path / "new").exists()
    assert contents(run) == before


def test_a_run_without_an_intact_checkpoint_is_left_unchanged(
    launcher: Launcher, interrupted: Path, tmp_path: Path
) -> None:
    """Starting again from step 0 would remove what a person may still mend."""
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    for checkpoint in (run / "checkpoints").iterdir():
        flip("state.json").do(checkpoint)
    before = contents(run)
    output = launcher.run("resume", "run", "loop.max_steps=80", status=2)
    assert "no checkpoint to continue from" in output
    assert output.count("state.json: its sha256") == 3
    assert contents(run) == before
