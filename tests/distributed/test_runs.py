"""Runs of several ranks through the command line, beside one process: losses, checkpoints, stops and failures."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.distributed.whole_runs import (
    RUN,
    SECONDS,
    TWO,
    assert_same_training,
    assert_same_validations,
    llmtrain,
    process_of_rank,
    rows,
    start,
    wait_for_step,
    write_text,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and the run ``one`` of one process."""
    path = tmp_path_factory.mktemp("ranks")
    write_text(path)
    llmtrain(path, "train", "run_dir=one", *RUN)
    return path


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "tensor", "context"])
def test_two_ranks_train_as_one_process(folder: Path, mode: str) -> None:
    done = llmtrain(folder, "train", f"run_dir={mode}", *RUN, f"distributed={mode}", TWO)
    dimension = {"ddp": "replicate", "fsdp": "shard"}.get(mode, mode)
    assert re.search(rf"processes +2: {dimension} 2\n", done.stdout), done.stdout
    assert_same_training(folder, mode)
    assert_same_validations(folder, mode)
    parts = sorted(path.name for path in (folder / mode / "checkpoints" / "step-00000012").glob("model*"))
    whole = (
        ["model.safetensors"] if mode in ("ddp", "context") else [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    )
    assert parts == whole
    assert (folder / mode / "ranks" / "rank-00001.log").is_file()


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_ranks(folder: Path) -> None:
    stages = [(3, "none", 1), (6, "fsdp", 2), (9, "hsdp", 4), (12, "none", 1)]
    for end, mode, processes in stages:
        words = ("train", "run_dir=elastic", *RUN) if end == 3 else ("resume", "elastic")
        more = ("distributed.shard=2",) if mode == "hsdp" else ()
        llmtrain(folder, *words, f"loop.max_steps={end}", f"distributed={mode}",
                        f"distributed.processes={processes}", *more)  # fmt: skip
    assert_same_training(folder, "elastic")
    llmtrain(folder, "verify", "elastic")


@pytest.mark.slow
def test_a_run_goes_on_with_ranks_that_share_positions(folder: Path) -> None:
    stages = [
        (3, "none", 1, ()), (6, "context", 2, ()), (9, "fsdp", 4, ("distributed.context=2",)), (12, "none", 1, ())
    ]  # fmt: skip
    for end, mode, processes, more in stages:
        words = ("train", "run_dir=positions", *RUN) if end == 3 else ("resume", "positions")
        llmtrain(folder, *words, f"loop.max_steps={end}", f"distributed={mode}",
                        f"distributed.processes={processes}", *more)  # fmt: skip
    assert_same_training(folder, "positions")
    assert_same_validations(folder, "positions")
    llmtrain(folder, "verify", "positions")


def test_a_signal_to_one_rank_stops_all_at_the_same_step(folder: Path) -> None:
    long = ("loop.max_steps=100000", "loop.eval_every=0", "loop.sample_every=0", "checkpoint.every_steps=0")
    process = start(folder, "train", "run_dir=stopped", *RUN, *long, "distributed=fsdp", TWO)
    wait_for_step(folder / "stopped", 2, process)
    os.kill(process_of_rank(folder / "stopped", 1), signal.SIGTERM)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, output + errors
    last = max(rows(folder / "stopped"))
    assert [path.name for path in (folder / "stopped" / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert "a signal to rank 1" in output


def test_a_killed_rank_is_named_and_a_restart_finishes_the_run(folder: Path) -> None:
    process = start(folder, "train", "run_dir=killed", *RUN, "checkpoint.every_steps=1", "loop.max_steps=40",
                    "distributed=ddp", TWO, "distributed.restarts=1")  # fmt: skip
    wait_for_step(folder / "killed", 3, process)
    os.kill(process_of_rank(folder / "killed", 1), signal.SIGKILL)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output + errors
    assert "rank 1" in errors
    assert "SIGKILL" in errors
    assert "restart 1 of 1" in errors
    assert sorted(rows(folder / "killed")) == list(range(1, 41))
    if not (folder / "undisturbed").exists():
        llmtrain(folder, "train", "run_dir=undisturbed", *RUN, "loop.max_steps=40", "distributed=ddp", TWO)
    one, other = rows(folder / "undisturbed"), rows(folder / "killed")
    assert [other[step]["loss"] for step in other] == [one[step]["loss"] for step in one]  # bit for bit


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("distributed=ddp",), "distributed.processes=null"),
        (("distributed=none", "distributed.processes=2"), "does not make a mesh of 2 processes"),
        (("distributed=hsdp", "distributed.processes=2"), "shard=8"),
        (("distributed=fsdp", TWO, "optimizer=adafactor"), "optimizer=adafactor"),
        (("distributed=context", "distributed.processes=3"), "take data.sequence_length=30"),
        (("distributed=ddp", "distributed.shard=-1"), "shard=-1"),
        (("distributed=ddp", TWO, "distributed.min_processes=1"), "min_processes=1: is about restarts"),
        (
            ("distributed=ddp", TWO, "distributed.min_processes=3", "distributed.restarts=1"),
            "distributed.min_processes=3: the run has 2 processes",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_before_anything_starts(
    folder: Path, words: tuple[str, ...], message: str
) -> None:
    done = llmtrain(folder, "train", "run_dir=refused", *RUN, *words, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("llmtrain: ") == 1
    assert not (folder / "refused").exists()
