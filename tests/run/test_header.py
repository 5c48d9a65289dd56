"""The header of a run: what is trained, how long, and what it goes on from."""

from pathlib import Path

import pytest

from llmtrain.cli.main import main
from tests.helpers.cli import TINY


def test_the_header_names_the_model_and_where_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("model=llama_tiny", "loop.max_steps=2", "checkpoint.every_steps=1", "name=mine")
    assert main(["train", *TINY[1:], *options, "run_dir=first"]) == 0
    header = capfd.readouterr().out
    assert "model      llama, 2 layers of 32, 31.4k parameters, context 64" in header
    assert "2 steps, 256 tokens" in header
    assert main(["resume", "first", "loop.max_steps=3"]) == 0
    header = capfd.readouterr().out
    assert "run        first\n" in header
    assert "1 more step, 128 tokens" in header
    assert "from step 2 to 3" in header
    assert main(["resume", "first", "step=2", "loop.max_steps=4", "run_dir=second"]) == 0
    header = capfd.readouterr().out
    assert "run        second, a branch of first at step 2\n" in header
    assert "from step 2 to 4" in header
