"""A full disk: the older checkpoints stay intact, the run continues and saves again once there is room."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.victims import (
    FILES,
    STANDARD,
    assert_all_whole,
    assert_log_whole,
    assert_same_rows,
    events,
    prepare,
    steps,
    wait_for,
    wait_for_step,
)
from tests.helpers.cli import assert_same_end
from tests.helpers.launcher import Launcher, Victim

FAILED = "the run continues and tries again"  # of the event's message
SAVING = (*STANDARD, "checkpoint.every_steps=4", "checkpoint.before_evaluation=false")


def wait_for_failures(victim: Victim, run: Path, count: int) -> None:
    wait_for(f"{count} failed saves", lambda: len(events(run, "save_failed")) >= count, victim)


def wait_for_save(victim: Victim, run: Path, after: int) -> None:
    wait_for(f"a save after step {after}", lambda: max(steps(run), default=0) > after, victim)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_on_a_full_disk_continues_and_saves_later(
    launcher: Launcher, undisturbed: Path, tmp_path: Path, asynchronous: str
) -> None:
    """In turn there is no room for the weights, and for the optimizer's state, which is twice as long."""
    run = tmp_path / "run"
    victim = launcher.start("train", *SAVING, f"checkpoint.asynchronous={asynchronous}", "run_dir=run")
    for failures, limit in enumerate((60_000, 200_000), start=1):
        wait_for_save(victim, run, after=max(steps(run), default=0))
        victim.limit_files(limit)
        wait_for_failures(victim, run, failures)
        kept = assert_all_whole(run)
        victim.limit_files(None)
        wait_for_save(victim, run, after=kept[-1])
    output = victim.wait(0)
    for row in events(run, "save_failed"):
        assert "File too large" in row["message"]
        assert FAILED in row["message"]
        assert row["step"] not in [saved["step"] for saved in events(run, "save")]
    assert output.count(FAILED) == (run / "train.log").read_text().count(FAILED) >= 2
    assert not list(run.rglob(".tmp-*"))
    assert assert_all_whole(run)[-1] == 80
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_log_whole(run)


def tear(victim: Victim, file: Path) -> None:
    """Let there be room for no more than a part of the next line."""
    victim.hold()
    limit = file.stat().st_size + 37
    victim.limit_files(limit)
    victim.release()
    wait_for("the limit", lambda: file.stat().st_size == limit, victim)
    assert not file.read_bytes().endswith(b"\n")


@pytest.mark.slow
def test_lines_are_written_once_a_full_disk_has_room(launcher: Launcher, undisturbed: Path, tmp_path: Path) -> None:
    """The limit falls into the middle of a line, of the metrics first and then of the log."""
    run = tmp_path / "run"
    victim = launcher.start("train", *SAVING, "run_dir=run")
    for file, step in ((run / "metrics.jsonl", 10), (run / "train.log", 40)):
        wait_for_step(victim, run, step)
        tear(victim, file)
        victim.limit_files(None)
    victim.wait(0)
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_log_whole(run)
    shown = [line for line in victim.text().splitlines() if line.startswith("step ")]
    logged = [line[21:] for line in (run / "train.log").read_text().splitlines() if line[21:].startswith("step ")]
    assert logged == shown


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log"])
def test_a_run_killed_in_the_middle_of_a_line_is_resumed(
    launcher: Launcher, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    """What waited for room is gone; the run logs those steps again, and glues nothing to the half of a line."""
    run = tmp_path / "run"
    victim = launcher.start("train", *SAVING, "run_dir=run")
    wait_for_step(victim, run, 10)
    tear(victim, run / name)
    victim.kill()
    launcher.run("resume", "run")
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_log_whole(run, torn=1)


GOING_BACK = """
import resource, sys
from pathlib import Path
from llmtrain.metrics.jsonl import drop_rows
from llmtrain.base.files import AppendedFile
path = Path(sys.argv[1])
file = AppendedFile(path)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
file.append('{"step":1}\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
file.append('{"step":2}\\n')
file.rewrite(lambda: drop_rows(path, lambda row: False))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
file.append('{"step":3}\\n')
file.close()
"""


def test_rewriting_a_file_with_a_torn_line_leaves_whole_lines(tmp_path: Path) -> None:
    """Rewriting the file takes the part of a line out; what is left of it must not come alone."""
    path = tmp_path / "rows"
    subprocess.run([sys.executable, "-c", GOING_BACK, str(path)], check=True)
    assert path.read_text() == '{"step":1}\n{"step":2}\n{"step":3}\n'


def test_a_disk_that_stays_full_ends_the_run(launcher: Launcher, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    victim = launcher.start("train", *SAVING, "run_dir=run")
    wait_for_save(victim, run, after=4)
    victim.limit_files(60_000)
    output = victim.wait(1)
    assert "the checkpoint could not be written" in output
    assert "llmtrain resume run" in output
    assert "Traceback" not in output
    before = assert_all_whole(run)
    assert before[-1] >= 8
    assert not list(run.rglob(".tmp-*"))
    launcher.run("resume", "run")
    assert events(run, "resume")[0]["step"] == before[-1]
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_log_whole(run, torn=1)


# --- a disk that is full indeed ---------------------------------------------------------------------------------------


class Disk:
    """A small file system of the victims' own, seen from here through ``/proc``."""

    def __init__(self, launcher: Launcher, mount: Path) -> None:
        self.launcher = launcher
        self.view = Path(f"/proc/{launcher.process.pid}/root{mount}")
        self.mount = mount

    def leave(self, num_bytes: int | None) -> None:
        """Fill it but for so many bytes, of which a file takes a page of 4 KiB at least; None: make room."""
        ballast = self.view / "ballast"
        ballast.unlink(missing_ok=True)
        if num_bytes is not None:
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.view).free - num_bytes)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mount = tmp_path / "disk"
    mount.mkdir()
    mounting = f"mount -t tmpfs -o size=4m none '{mount}'"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mounting], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted here")
    with Launcher(tmp_path, wrapper=[*unshare, f'{mounting} && exec "$@"', "sh"]) as launcher:
        assert launcher.ready.wait(60)
        disk = Disk(launcher, mount)
        prepare(disk.view)
        yield disk


def hold_between_saves(victim: Victim, run: Path) -> None:
    """Stop the victim when it has its two checkpoints and writes and removes none."""
    for _ in range(1000):
        victim.hold()
        if not list(run.glob("checkpoints/.tmp-*")) and len(steps(run)) == 2:
            return
        victim.release()
        time.sleep(0.01)
    raise AssertionError(f"always saving\n{victim.text()}")


def pages(num_bytes: int) -> int:
    """``num_bytes`` as a file system of 4 KiB pages counts them."""
    return -(-num_bytes // 4096) * 4096


@pytest.mark.slow
def test_a_file_system_without_room_loses_no_checkpoint(disk: Disk, undisturbed: Path) -> None:
    """No room for the tensors, which is known beforehand; then none for state, config and manifest in turn.

    Nor is there any for metrics and log, or, in the end, for what a resume notes.
    """
    run = disk.view / "run"
    victim = disk.launcher.start("train", *SAVING, "run_dir=run", cwd=disk.mount)
    wait_for_save(victim, run, after=4)
    hold_between_saves(victim, run)
    newest = run / "checkpoints" / f"step-{steps(run)[-1]:08d}"
    sizes = [pages((newest / name).stat().st_size) for name in FILES]
    victim.release()
    for room in (sizes[0], *(sum(sizes[:count]) for count in (2, 3, 4)), 0):
        wait_for_save(victim, run, after=max(steps(run), default=0))
        hold_between_saves(victim, run)
        kept, told = steps(run), victim.text().count(FAILED)
        disk.leave(room)
        victim.release()
        wait_for("a failed save", lambda: victim.text().count(FAILED) > told, victim)  # noqa: B023
        assert assert_all_whole(run) == kept
        if room:
            disk.leave(None)
    output = victim.wait(1)
    assert "the checkpoint could not be written" in output
    assert "Traceback" not in output
    assert output.count("bytes are needed") >= 2  # known beforehand
    assert output.count("No space left") >= 3
    refused = disk.launcher.run("resume", "run", status=1, cwd=disk.mount)
    assert "No space left" in refused
    assert "Traceback" not in refused
    assert assert_all_whole(run) == kept
    disk.leave(None)
    disk.launcher.run("resume", "run", cwd=disk.mount)
    assert_same_end(undisturbed, run)
    assert_same_rows(undisturbed, run)
    assert_all_whole(run)
    assert_log_whole(run, torn=1)
