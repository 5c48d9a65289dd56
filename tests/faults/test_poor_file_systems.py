"""File systems without locks, without syncing of directories, without hard links, without renaming over a file."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from llmtrain.base.files import replace_directory, write_atomically
from llmtrain.cli.main import main
from tests.helpers.cli import TINY, assert_same_end

RUN = (*TINY, "loop.max_steps=4", "checkpoint.every_steps=2", "checkpoint.asynchronous=false", "data=text",
       "data.path=text.txt", "data.cache_dir=cache", "loop.eval_every=2")  # fmt: skip


def refuse(number: int) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"line {hash((1, n))}: {n * 7919}\n" for n in range(400)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def poor_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def sync_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    def only_to_new_names(call: Any) -> Any:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            if Path(target).exists():
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
            call(source, target, **options)

        return renamed

    monkeypatch.setattr(os, "fsync", sync_files_alone)
    monkeypatch.setattr(os, "replace", only_to_new_names(replace))
    monkeypatch.setattr(os, "rename", only_to_new_names(rename))
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))


def test_a_run_is_trained_resumed_branched_and_verified_on_a_poor_file_system(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poor_file_system(monkeypatch)
    monkeypatch.setenv("LLMTRAIN_CACHE", str(folder / "other"))
    assert main(["train", *RUN, "run_dir=run"]) == 0
    assert "this file system has no locks; make sure that no other process works in this run" in capsys.readouterr().err
    assert main(["resume", "run", "loop.max_steps=6"]) == 0
    assert main(["resume", "run", "step=4", "loop.max_steps=6", "run_dir=branch"]) == 0
    assert main(["verify", "run"]) == 0
    assert_same_end(folder / "run", folder / "branch")
    assert not list(folder.rglob(".tmp-*"))


def test_without_locks_a_process_that_is_there_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *RUN, "run_dir=run"]) == 0
    (folder / "run" / ".lock").write_text(str(os.getppid()))
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    assert main(["resume", "run", "loop.max_steps=6"]) == 2
    assert f"another process (pid {os.getppid()}) seems to work in this run" in capsys.readouterr().err


def test_a_failed_renaming_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real refusal stays one: of the new name, and of the old."""
    path, replaced = tmp_path / "a.json", tmp_path / "folder"
    write_atomically(path, "old")
    replaced.mkdir()
    (replaced / "old").touch()
    (tmp_path / "new").mkdir()
    monkeypatch.setattr(os, "replace", refuse(errno.EACCES))
    monkeypatch.setattr(os, "rename", refuse(errno.EACCES))
    with pytest.raises(PermissionError):
        write_atomically(path, "new")
    with pytest.raises(PermissionError):
        replace_directory(tmp_path / "new", replaced)
    assert path.read_text() == "old"
    assert (replaced / "old").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_failing_disk_is_still_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error.*a\.json"):
        write_atomically(tmp_path / "a.json", "new")
    assert not list(tmp_path.iterdir())
