"""A rank that is killed in a save, or has no room, loses no checkpoint and holds up no other rank."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.base.files import sweep_leftovers
from llmtrain.checkpoint.directory import find_checkpoints, step_of
from llmtrain.checkpoint.format import verify_checkpoint
from llmtrain.checkpoint.stored_tensors import read_group
from tests.checkpoint.killed_ranks import FAILED

ROOT = Path(__file__).parents[2]


def attempts(kind: str, folder: Path) -> list[dict[str, Any]]:
    """The reports of :mod:`killed_ranks`."""
    (folder / "first").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.killed_ranks", kind, str(folder)], cwd=ROOT, capture_output=True,
        text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def steps_after_a_sweep(run: Path) -> list[int]:
    """The steps of the checkpoints that the next start finds, all of them intact, and nothing else."""
    sweep_leftovers(run / "checkpoints")
    found = find_checkpoints(run)
    assert sorted((run / "checkpoints").iterdir()) == found
    for path in found:
        verify_checkpoint(path)
        assert read_group(path, "model")["w"].unique().tolist() == [step_of(path)]
    return [step_of(path) for path in found]


@pytest.mark.slow
def test_a_rank_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    kept: dict[int, list[list[int]]] = {0: [], 1: []}
    for each in attempts("kill", tmp_path):
        victim, statuses = each["victim"], each["statuses"]
        survivor = statuses[1 - victim]
        steps = steps_after_a_sweep(Path(each["run"]))
        if statuses[victim] == -signal.SIGKILL:
            assert survivor == FAILED or (survivor == 0 and 2 in steps), each
            if survivor == FAILED:
                error = (Path(each["run"]) / f"error-{1 - victim}.txt").read_text()
                assert error.startswith("RuntimeError: the ranks did not agree on a save, one may have ended: "), error
        else:
            assert (statuses, steps) == ([0, 0], [2]), each
        kept[victim].append(steps)
    # rank 0 also makes the directory, writes state, config, index and manifest, renames, and removes the old checkpoint
    assert [kept[0][0], kept[0][-1]] == [[1], [2]]
    assert [1, 2] in kept[0]
    assert len(kept[0]) > 12
    # rank 1 writes two files of its own; nothing is committed without them
    assert kept[1][:-1] == [[1]] * (len(kept[1]) - 1)
    assert len(kept[1]) >= 5


def test_a_full_disk_of_one_rank_fails_the_save_on_both(tmp_path: Path) -> None:
    for each in attempts("full", tmp_path):
        run = Path(each["run"])
        assert each["statuses"] == [FAILED, FAILED]
        errors = {(run / f"error-{rank}.txt").read_text() for rank in (0, 1)}
        assert len(errors) == 1
        assert f"rank {each['victim']}: " in errors.pop()
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
        assert steps_after_a_sweep(run) == [1]
