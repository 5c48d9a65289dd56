"""Checkpoint directories: whole or absent, and every damaged file named."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.base.files import share, sweep_leftovers, write_atomically
from llmtrain.base.run_files import MANIFEST
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import find_checkpoints, locate_checkpoint
from llmtrain.checkpoint.format import confirm_checkpoint, remove_checkpoint, verify_checkpoint, write_checkpoint


def write(path: Path, value: float = 1.0) -> Path:
    tensors = {"w": torch.full((100,), value)}
    write_checkpoint(path, model=tensors, optimizer={"w/m": torch.zeros(100)}, state={"step": 3}, config="name: x\n")
    return path


def test_a_written_checkpoint_verifies(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints" / "step-00000003")
    verify_checkpoint(path)
    assert find_checkpoints(tmp_path) == [path]
    assert locate_checkpoint(tmp_path) == locate_checkpoint(path) == path
    assert not list(path.parent.glob(".tmp*"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "manifest.json"]
)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "step-00000003")
    original = (path / name).read_bytes()
    changed = bytearray(original)
    changed[len(changed) // 2] ^= 0x41
    damages = {"truncated": original[:-1], "missing": None, "flipped": bytes(changed)}
    for content in damages.values():
        (path / name).unlink(missing_ok=True)
        if content is not None:
            (path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.json|\.safetensors" if name == MANIFEST else name):
            verify_checkpoint(path)


def test_names_in_the_manifest_stay_in_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "step-00000003")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        verify_checkpoint(path)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    """Also white space, a counter, or a key that nobody reads."""
    path = write(tmp_path / "step-00000003")
    original = (path / MANIFEST).read_bytes()
    for position in range(len(original)):
        for bit in (0x01, 0x10):
            changed = bytearray(original)
            changed[position] ^= bit
            (path / MANIFEST).write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"manifest\.json|step-00000003"):
                verify_checkpoint(path)
    (path / MANIFEST).write_bytes(original)
    verify_checkpoint(path)


def test_an_extra_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "step-00000003")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt: not of this checkpoint"):
        verify_checkpoint(path)


def test_a_file_that_holds_other_tensors_than_written_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "step-00000003")
    model, optimizer = {"w": torch.full((100,), 1.0)}, {"w/m": torch.zeros(100)}
    confirm_checkpoint(path, model=model, optimizer=optimizer)
    model["w"][57] = 1.0000001
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w reads back differently"):
        confirm_checkpoint(path, model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: does not hold the tensors that were written"):
        confirm_checkpoint(path, model={"w": torch.full((100,), 1.0)}, optimizer={})


def test_a_kill_between_the_renames_of_a_replacement_is_undone(tmp_path: Path) -> None:
    path = write(tmp_path / "step-00000003", 1.0)
    path.rename(tmp_path / ".tmp-replaced-step-00000003")  # as far as the killed process came
    sweep_leftovers(tmp_path)
    verify_checkpoint(path)
    write(tmp_path / "step-00000003", 2.0)
    (tmp_path / ".tmp-replaced-step-00000003").mkdir()  # of a process killed one step later
    (tmp_path / ".tmp-replaced-step-00000003" / "model.safetensors").write_text("old")
    sweep_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000003"]
    verify_checkpoint(path)


def test_removing_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "step-00000003")
    remove_checkpoint(path)
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal, sys
from pathlib import Path
from llmtrain.base.files import AppendedFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = AppendedFile(Path(sys.argv[1]))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
file.append("one\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
for line in ("two\\n", "three\\n", "four\\n"):
    file.append(line)
print(repr(Path(sys.argv[1]).read_text()))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
file.append("five\\n")
file.close()
"""


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == repr("one\ntwo\nth") + "\n"
    assert path.read_text() == "one\ntwo\nthree\nfour\nfive\n"


def test_a_full_disk_leaves_no_new_checkpoint_and_keeps_the_old(tmp_path: Path) -> None:
    old = write(tmp_path / "step-00000003")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000004|File too large"):
            write(tmp_path / "step-00000004")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    verify_checkpoint(old)


def test_rewriting_a_step_replaces_it(tmp_path: Path) -> None:
    path = write(tmp_path / "step-00000003", 1.0)
    write(path, 2.0)
    verify_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-1-99").mkdir()
    (tmp_path / ".tmp-step-1-99" / "x").touch()
    (tmp_path / ".tmp-config.yaml-99").touch()
    keep = write(tmp_path / "step-00000003")
    sweep_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [keep]


def test_text_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# One that has imported torch makes the writers, each of which is killed a little later in its life.
WRITERS = """
import itertools, os, signal, sys, time
from pathlib import Path
import torch
from llmtrain.checkpoint.format import write_checkpoint
weights = {"w": torch.zeros(500_000)}
for attempt in range(8):
    if (writer := os.fork()) == 0:
        for i in itertools.count():
            path = Path(sys.argv[1], str(attempt), f"step-{i:08d}")
            write_checkpoint(path, model=weights, optimizer=weights, state={"step": i}, config="x")
    time.sleep(0.01 + 0.02 * attempt)
    while attempt == 7 and not any(Path(sys.argv[1]).rglob("step-*")):  # on a busy machine
        time.sleep(0.01)
    os.kill(writer, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]))
"""


@pytest.mark.slow
def test_killed_writers_leave_intact_checkpoints(tmp_path: Path) -> None:
    """SIGKILL at arbitrary moments: whatever is named a checkpoint verifies."""
    done = subprocess.run([sys.executable, "-c", WRITERS, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, [str(-signal.SIGKILL)] * 8), done.stderr
    for path in tmp_path.rglob("step-*"):
        verify_checkpoint(path)
    assert any(tmp_path.rglob("step-*"))


def test_files_have_the_permissions_of_their_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "model.safetensors"
    file.touch(0o600)
    share(file)
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_folder_of_runs_and_an_export_are_named_as_such(tmp_path: Path) -> None:
    for name, when in (("old", 1), ("new", 2)):
        run = tmp_path / "runs" / "2026-01-02" / name
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
        os.utime(run / "config.yaml", (when, when))
    with pytest.raises(CheckpointError, match=r"the newest run in it is .*2026-01-02/new$"):
        locate_checkpoint(tmp_path / "runs")
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"weights=huggingface weights\.path="):
        locate_checkpoint(tmp_path)
