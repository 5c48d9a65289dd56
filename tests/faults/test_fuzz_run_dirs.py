"""Some of the cases of ``make fuzz``; and the fuzzer notices what it is there for."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import fuzz_run_dirs
from tests.faults.fuzz_run_dirs import Case
from tests.faults.run_mutations import MUTATIONS, OUTSIDE
from tests.helpers.launcher import Launcher

CASES = 100


def test_run_directories_changed_at_random() -> None:
    """In a process of its own, which has no threads and may fork."""
    command = [
        sys.executable,
        fuzz_run_dirs.__file__,
        "--quick",
        "--cases",
        str(CASES),
        "--seed",
        "3",
        "--workers",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CASES} run directories, 0 answered wrongly" in done.stdout


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("raise KeyError('step')", "traceback"),
        ("import time; time.sleep(60)", "no end within"),
        ("raise SystemExit(3)", "exit status 3"),
        ("open('../../../elsewhere', 'w')", "writes outside"),
        (f"open('../{OUTSIDE}/precious', 'w')", f"changes {OUTSIDE}/precious"),
        ("open('left', 'w'); print('llmtrain: no'); raise SystemExit(2)", "exit status 2 and changed: work/left"),
        ("raise SystemExit(2)", "without a message"),
        ("open('obeyed', 'w')", "code in the run was run"),
        ("pass", "passes for intact: step-00000002"),
    ],
)
def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, problem: str) -> None:
    """With a program of the test's in place of ours, and a checkpoint that is damaged."""
    world = fuzz_run_dirs.prepare(tmp_path / "world")
    (world / OUTSIDE).mkdir()
    (world / OUTSIDE / "precious").touch()
    checkpoint = world / "work" / "run" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")

    def start(_: object) -> int:
        exec(call, {})
        return 0

    monkeypatch.setattr(fuzz_run_dirs, "start", start)
    monkeypatch.setattr(fuzz_run_dirs, "SECONDS", 2.0)
    case = Case(1, "text", ("flip",), False, ("verify", "run"), 0)
    done = fuzz_run_dirs.attempt(case, tmp_path / "case", world)
    assert any(problem in found for found in done.problems), done


def test_every_mutation_changes_a_run(server: Launcher, undisturbed: Path, tmp_path: Path) -> None:
    for mutation in MUTATIONS:
        for number in range(8):
            work = tmp_path / f"{mutation.__name__}-{number}" / "work"
            run = Path(shutil.copytree(undisturbed, work / "run"))
            outside = work.parent / OUTSIDE
            outside.mkdir()
            before = fuzz_run_dirs.snapshot(run)
            mutation(run, random.Random(number))
            changed = fuzz_run_dirs.snapshot(run) != before
            shutil.rmtree(work.parent)
            if changed:
                break
        assert changed, mutation.__name__
