"""A run keeps the number of threads that it was trained with, and says so where there are more cores."""

import json
from pathlib import Path

import pytest

from llmtrain.base.threads import allowed_cpus
from llmtrain.cli.main import main
from llmtrain.run.directory import RunDirectory
from tests.helpers.cli import TINY

RUN = [argument for argument in TINY if not argument.startswith("runtime")]


def device_of(run: Path) -> str:
    environment = json.loads((run / "environment.json").read_text())
    return [environment, *environment.get("resumes", [])][-1]["device"]


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="needs two cores")
def test_a_resumed_run_keeps_its_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["train", *RUN, "loop.max_steps=1", f"run_dir={run}"]) == 0
    assert device_of(run).endswith(", 1 thread")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    capsys.readouterr()
    assert main(["resume", str(run), "loop.max_steps=2"]) == 0
    assert "1 thread, as before: another number changes the last bits" in capsys.readouterr().out
    assert device_of(run).endswith(", 1 thread")
    assert main(["resume", str(run), "loop.max_steps=3", "runtime.num_threads=2"]) == 0
    assert device_of(run).endswith(", 2 threads")
    assert RunDirectory(run).recorded_threads() == 2
