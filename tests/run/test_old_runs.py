"""Runs of an earlier version, with its names of classes, go on: tests/old_runs/README.md."""

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.cli.main import main
from llmtrain.config import stored_config
from tests.helpers.cli import rows

OLD = Path(__file__).parents[1] / "old_runs"
RUNS = ("pretraining", "classification", "instruction_lora")
RESUMED_FROM = 8
TOLERANCE = {"classification": 1e-3}  # in bf16, which other processors round otherwise
MEASURED = ("tokens_per_second", "mfu", "memory_bytes")  # and every key that ends with seconds
OTHERWISE = (
    "epoch",
)  # older versions divided tokens by some that are never trained; now the share of the data visited


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old runs, as the current directory: their paths are relative."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_an_old_config_is_read_by_its_old_class_names(name: str) -> None:
    text = (OLD / name / "config.yaml").read_text()
    for old_name in ("run.Run", "checkpoint.Checkpoint", "loop_config.LoopConfig", "runtime.Runtime"):
        assert f"_target_: llmtrain.{old_name}\n" in text
    loaded = stored_config.load(OLD / name / "config.yaml")
    assert loaded["_target_"] == "llmtrain.run.run.Run"
    assert loaded["loop"]["_target_"] == "llmtrain.train.config.LoopConfig"


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_resumes_to_the_end_that_it_had(old: Path, name: str) -> None:
    expected = [row for row in json.loads((old / f"{name}.expected.json").read_text())["rows"] if "event" not in row]
    assert main(["resume", name]) == 0
    found = [row for row in rows(old / name) if row["step"] > RESUMED_FROM and "event" not in row]
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        for key, value in wanted.items():
            if key not in (*MEASURED, *OTHERWISE) and not key.endswith("seconds"):
                is_number = isinstance(value, float)
                near = pytest.approx(value, rel=TOLERANCE.get(name, 1e-5)) if is_number else value
                assert row[key] == near, (row["step"], key)
    assert json.loads((old / name / "summary.json").read_text())["exit_reason"] == "finished"


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_verified(old: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Its files; and, on any processor, steps that this version has made from its checkpoint."""
    assert main(["verify", name, "replay_steps=0"]) == 0
    assert main(["resume", name]) == 0
    capfd.readouterr()
    assert main(["verify", name]) == 0
    output = capfd.readouterr().out
    assert f"from step {RESUMED_FROM}" in output
    assert "bit for bit" in output


@pytest.mark.parametrize(("name", "letter"), [("pretraining", "n"), ("instruction_lora", "a")])
def test_an_old_run_generates(old: Path, name: str, letter: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", name, "prompt=The lamp", "max_tokens=20", "temperature=0", "device=cpu"]) == 0
    assert "The lamp" + 20 * letter in capfd.readouterr().out


def test_an_old_classifier_predicts(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "classification", "text=Claim your reward now", "device=cpu"]) == 0
    words = capfd.readouterr().out.split()
    assert float(words[words.index("ham") + 1]) == pytest.approx(0.5496, abs=0.005)
    assert float(words[words.index("spam") + 1]) == pytest.approx(0.4504, abs=0.005)


@pytest.mark.parametrize(
    ("name", "keys"),
    [*((name, ()) for name in RUNS), ("instruction_lora", ("format=peft",))],
    ids=[*RUNS, "adapter"],
)
def test_an_old_run_is_exported(old: Path, name: str, keys: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """The command itself compares the logits of what it has written."""
    assert main(["export", name, "to=exported", *keys]) == 0
    assert "logits differ by up to" in capfd.readouterr().out
    assert list((old / "exported").glob("*.safetensors"))
