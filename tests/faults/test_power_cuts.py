"""The power fails: what was not synced is gone, and still the newest checkpoint that the run told of is whole."""

import json
import signal
from pathlib import Path

import pytest

from tests.faults.power import PRELUDE
from tests.faults.victims import STANDARD, assert_all_whole
from tests.helpers.cli import assert_same_end
from tests.helpers.launcher import Launcher

SAVING = (*STANDARD, "checkpoint.every_steps=2", "checkpoint.keep_last=1", "checkpoint.before_evaluation=false")
# A save syncs five files and their folder, renames it, syncs the one above; renames what it replaces, and syncs again.
CALLS = 10


def newest_told(folder: Path) -> int:
    """The step of the newest checkpoint that the run had said it had saved, at the moment of the cut."""
    path = folder / "told.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    told = [row for row in (json.loads(line) for line in lines if line.endswith(b"\n")) if row.get("event") == "save"]
    return max((row["step"] for row in told), default=0)


@pytest.mark.slow
def test_a_power_cut_at_any_write_leaves_a_resumable_run(launcher: Launcher, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command: tuple[str, ...] = ("train", *SAVING, "run_dir=run")
    found: list[int] = []
    for call in (0, 2, 4, 5, 6, 8):
        prelude = PRELUDE.format(folder=str(run), at=2 * CALLS + call, seed=f"power {call}")
        launcher.start(*command, prelude=prelude).wait(-signal.SIGKILL)
        before, found = found, assert_all_whole(run)
        told = newest_told(tmp_path)
        assert told, "nothing was saved before the cut"
        assert max(found, default=0) >= max([told, *before]), f"cut at call {call}: step {told} was said to be saved"
        command = ("resume", "run")
    launcher.run(*command)
    assert_same_end(undisturbed, run)
    assert_all_whole(run)
