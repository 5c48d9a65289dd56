"""The header of a run: what is trained, how long, and what it goes on from."""

import json
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


def test_what_is_left_out_is_a_warning_where_it_may_be_text_and_brief_on_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "docs"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"A line of {name}.\n" * 300)
    (folder / "c.txt").write_bytes(b"a\0")
    tiny = [option for option in TINY[1:] if not option.startswith("data")]
    data = ("data=text", "data.path=docs", "data.validation_fraction=0.1", "data.sequence_length=32")
    assert main(["train", *tiny, *data, "model=tiny", "loop.max_steps=1", "run_dir=run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "data.path=docs: left out, hidden: 1 (0 B): .git" in lines
    assert "warning: data.path=docs: left out, binary, not text, though its name says so: 1 (2 B): c.txt" in lines
    split = "validation  10.0% of the tokens: the end of 2 of 2 documents"
    assert f"{split}; from docs/a.txt 10.0%, docs/b.txt 10.0%" in lines
    assert main(["resume", "run", "loop.max_steps=2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "data.path=docs: left out: 1 hidden; 1 binary, not text, though its name says so" in lines
    assert split in lines
    assert [line for line in lines if "left out, " in line] == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("event") == "warning" and "hidden" in row["message"] for row in rows)


def test_a_gpu_that_is_not_used_is_said_in_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmtrain.run.session.unused_gpu_reason", lambda: "training on the CPU: a reason")
    options = (*TINY, "loop.max_steps=1", "checkpoint.asynchronous=false")
    assert main(["train", *options, "run_dir=run"]) == 0
    assert "warning: training on the CPU: a reason" in capfd.readouterr().out.splitlines()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["message"] for row in rows if row.get("key") == "runtime.device"] == ["training on the CPU: a reason"]
    assert main(["train", *options, "runtime.device=cpu", "run_dir=other"]) == 0
    assert "a reason" not in capfd.readouterr().out  # the user has chosen it
