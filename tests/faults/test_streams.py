"""Standard streams that are closed, full, unread, or cannot show a character."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.victims import STANDARD
from tests.helpers.launcher import Launcher

LLMTRAIN = [sys.executable, "-m", "llmtrain"]
QUICK = ("loop.max_steps=2", "loop.sample_every=0")

CLOSE = """
import os
from llmtrain.base.streams import open_standard_streams
import sys
for number, name in enumerate(("stdin", "stdout", "stderr")):
    os.close(number)
    setattr(sys, name, None)
open_standard_streams()
"""


def test_with_closed_streams_nothing_is_written_into_the_files_of_a_run(launcher: Launcher, tmp_path: Path) -> None:
    output = launcher.run("train", *STANDARD, *QUICK, "run_dir=run", prelude=CLOSE)
    assert output == ""
    for file in ("metrics.jsonl", "config.yaml"):
        assert "model      " not in (tmp_path / "run" / file).read_text()
    assert "finished at step 2" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_the_program_starts_with_closed_streams(closed: str) -> None:
    command = f'"$0" -m llmtrain --version {closed}'
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--cfg", "job")])
def test_an_output_that_nobody_reads_or_that_is_full_ends_without_a_traceback(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*LLMTRAIN, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*LLMTRAIN, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("llmtrain: No space left on device")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_report_that_nobody_reads_ends_without_a_message(launcher: Launcher, tmp_path: Path) -> None:
    """rich, which prints it, has a way of its own to end."""
    launcher.run("train", *STANDARD, *QUICK, "run_dir=run")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*LLMTRAIN, "report", "run"], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"\u00e4\u4e2d\ud83d\ude00"), ("latin-1", r"ä\u4e2d\ud83d\ude00"), ("utf-8", "ä中😀")],
)
def test_characters_that_an_encoding_lacks_are_written_as_json_does(encoding: str, shown: str) -> None:
    code = "from llmtrain.base.streams import *\nescape_unknown_characters()\nprint('ä中😀')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": encoding})  # fmt: skip
    assert done.stdout.decode(encoding).strip() == shown
