"""The fence around fuzzed processes: what is tried outside fails and is found, what is done inside works."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.confinement import differences, landlock, prepare, run_confined, snapshot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fork, Landlock, /proc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path / "inside")


def writes(path: str) -> Callable[[], int]:
    def write() -> int:
        Path(path).write_text("x")
        return 0

    return write


def test_a_file_inside_is_written_and_found(folder: Path) -> None:
    before = snapshot(folder)
    outcome = run_confined(folder, writes("here.txt"), seconds=20)
    assert (outcome.status, outcome.outside) == (0, [])
    assert differences(before, snapshot(folder)) == [str(folder / "work" / "here.txt")]


@pytest.mark.parametrize("path", ["../../there.txt", "out/there.txt"])
def test_a_file_outside_is_not_written_and_the_attempt_is_reported(folder: Path, path: str) -> None:
    (folder / "work" / "out").symlink_to(folder.parent)
    outcome = run_confined(folder, writes(path), seconds=20)
    assert outcome.crashed
    assert outcome.outside == [f"open {folder.parent / 'there.txt'}"]
    assert not (folder.parent / "there.txt").exists()


@pytest.mark.parametrize("act", [Path.unlink, Path.rmdir, lambda path: path.rename("mine"), lambda p: p.chmod(0o777)])
def test_nothing_outside_is_removed_moved_or_changed(folder: Path, act: Callable[[Path], object]) -> None:
    victim = folder.parent / "victim"
    victim.write_text("x")
    before = snapshot(folder.parent)
    outcome = run_confined(folder, lambda: act(victim) and 0, seconds=20)
    assert outcome.outside
    assert differences(before, snapshot(folder.parent)) == []


def test_a_program_that_it_starts_is_confined_too(folder: Path) -> None:
    probe = run_confined(folder, lambda: int(not landlock(folder)), seconds=20)
    if probe.status:
        pytest.skip("the kernel has no Landlock")
    target = folder.parent / "there.txt"
    outcome = run_confined(folder, lambda: subprocess.call(["touch", str(target)]), seconds=20)
    assert outcome.status == 1
    assert not target.exists()


def test_a_process_without_end_is_killed(folder: Path) -> None:
    def hang() -> int:
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)
        return 0

    outcome = run_confined(folder, hang, seconds=0.5)
    assert outcome.status is None
    assert outcome.seconds < 10


def test_exit_status_and_home_are_those_of_the_process(folder: Path) -> None:
    def show() -> int:
        print(os.environ["HOME"], Path.cwd())
        return 75

    outcome = run_confined(folder, show, seconds=20)
    assert outcome.status == 75
    assert outcome.output.split() == [str(folder / "home"), str(folder / "work")]
