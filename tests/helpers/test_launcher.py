"""A command that is forked is the command: the same bits, words and exit status as from a shell."""

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cli import TINY, assert_same_end, launcher, llmtrain, rows

if sys.platform != "linux":
    pytest.skip("cli.llmtrain forks on Linux alone", allow_module_level=True)

FORKED_AND_FRESH = (False, True)
QUICK = (*TINY, "loop.max_steps=3")
BROKEN = """
from dataclasses import dataclass
from llmtrain.objective.causal import Causal
@dataclass(frozen=True)
class Broken(Causal):
    def __call__(self, *arguments, **options):
        raise RuntimeError("no such luck")
"""
DEADLY = """
import os, pathlib, resource, signal, sys
from dataclasses import dataclass
from llmtrain.objective.causal import Causal
note = [os.environ.get("NOTE"), os.getcwd(), resource.getrlimit(resource.RLIMIT_FSIZE)[0]]
pathlib.Path("seen").write_text(repr([*note, os.getppid(), sys.stdin.read()]))
os.environ["NOTE"] = "changed"
@dataclass(frozen=True)
class Deadly(Causal):
    def __call__(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def told(text: str) -> list[str]:
    """What was written, without numbers and units, nor that text is tokenised, which is so but once."""
    lines = re.sub(r"\d[\d.,e+-]*( ?[kMGT]?(FLOP/s|tok/s|B|ms|s)\b)?", "N", text).splitlines()
    return [re.sub(" +", " ", line) for line in lines if not line.startswith("tokenising")]


@contextlib.contextmanager
def here(tmp_path: Path, fresh: bool) -> Iterator[Path]:
    """A folder of the same name for both, kept under another."""
    folder = tmp_path / "here"
    folder.mkdir()
    yield folder
    folder.rename(tmp_path / ("fresh" if fresh else "forked"))


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    """With dropout, an evaluation, a sample and the default number of threads."""
    quick = [value for value in QUICK if not value.startswith(("loop.eval", "loop.sample", "runtime."))]
    looks = ("model.dropout=0.1", "loop.eval_every=3", "loop.eval_batches=1", "loop.sample_every=3",
             "loop.sample_tokens=8")  # fmt: skip
    for fresh in FORKED_AND_FRESH:
        with here(tmp_path, fresh) as folder:
            llmtrain("train", *quick, *looks, "run_dir=run", cwd=folder, fresh=fresh)
    one, other = (tmp_path / name / "run" for name in ("forked", "fresh"))
    assert_same_end(one, other)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    assert (one / "config.yaml").read_bytes() == (other / "config.yaml").read_bytes()
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert len(rows(one)) > 3
    for left, right in zip(rows(one), rows(other), strict=True):
        assert left.keys() == right.keys()
        assert left.get("loss") == right.get("loss")
    left, right = (json.loads((run / "environment.json").read_text()) for run in (one, other))
    assert left | {"time": None} == right | {"time": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["train", "optimizer.lrr=1"], 2),
        # A bug, with its traceback
        (["train", *QUICK, "objective._target_=mine.Broken", "plugins=[mine]", "run_dir=run"], 1),
        (["train", *QUICK, "--cfg", "job"], 0),
        (["--help"], 0),
    ],
)
def test_what_is_said(tmp_path: Path, arguments: list[str], status: int) -> None:
    """All of it, but for the numbers that are measured and their units."""
    found = []
    for fresh in FORKED_AND_FRESH:
        with here(tmp_path, fresh) as folder:
            (folder / "mine.py").write_text(BROKEN)
            done = llmtrain(*arguments, cwd=folder, check=status, fresh=fresh)
            found.append((told(done.stdout), told(done.stderr)))
    assert found[0] == found[1]
    assert any(found[0])


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """Environment, folder, limits and death are those of one command, and nothing of it is left for the next."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text(DEADLY)
    deadly = ("train", *QUICK, "objective._target_=mine.Deadly", "plugins=[mine]", "run_dir=run")
    elsewhere = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "elsewhere"), os.environ.get("PYTHONPATH", "")])}
    llmtrain(*deadly, cwd=tmp_path, check=-signal.SIGKILL, env=elsewhere | {"NOTE": "one"}, file_bytes=1 << 20)
    parent = launcher().process.pid
    assert (tmp_path / "seen").read_text() == repr(["one", str(tmp_path), 1 << 20, parent, ""])
    assert "mine" in llmtrain(*deadly, cwd=tmp_path, check=2, env={"NOTE": "two"}).stderr  # it is on no path any more
    assert not list((tmp_path / "run").rglob("step-*"))
    assert "NOTE" not in os.environ
