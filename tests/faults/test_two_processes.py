"""One run directory, two processes: the second is refused, and may as soon as the first is gone, however it went."""

import signal
import time
from pathlib import Path

from tests.faults.victims import STANDARD, assert_all_whole, steps, wait_for
from tests.helpers.launcher import Launcher


def test_the_second_process_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    victim = launcher.start("train", *STANDARD, "checkpoint.every_steps=5", "run_dir=run")
    wait_for("a checkpoint", lambda: steps(run), victim)
    victim.hold()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments in (("resume", "run"), ("resume", "run", "loop.max_steps=90"), ("verify", "run")):
        output = launcher.run(*arguments, status=2)
        assert f"another process (pid {victim.pid}) is working in this run" in output
        assert "Traceback" not in output
    assert "run_dir=run: exists already" in launcher.run("train", *STANDARD, "run_dir=run", status=2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    victim.kill()
    launcher.run("resume", "run", "loop.max_steps=12")
    assert assert_all_whole(run)[-1] == 12


def test_one_of_several_processes_gets_the_run(launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher.run("train", *STANDARD, "loop.max_steps=3", "run_dir=run")
    rivals = [launcher.start("resume", "run", "loop.max_steps=100000") for _ in range(3)]
    deadline = time.monotonic() + 60
    while sum(rival.is_running() for rival in rivals) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    for rival in rivals:
        rival.kill()
    assert sorted(rival.returncode or 0 for rival in rivals) == [-signal.SIGKILL, 2, 2]
    assert_all_whole(run)
