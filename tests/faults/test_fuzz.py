"""Some command lines at random, in every run of the tests; ``make fuzz`` tries thousands."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow
def test_random_command_lines_are_answered() -> None:
    """No traceback, no hang, a documented exit status, nothing outside of the folder, nothing left by status 2."""
    command = [sys.executable, str(FOLDER / "fuzz_commands.py"), "--cases", "120", "--seed", "3", "--cheap"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "120 command lines, 0 answered wrongly" in done.stdout
