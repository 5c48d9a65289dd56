"""The linter from the command line: errors stop a run before it has a directory, warnings are seen and recorded."""

import shutil
from pathlib import Path

import pytest

from llmtrain import Run
from llmtrain.cli.main import main
from llmtrain.config import stored_config
from tests.helpers.cli import TINY, llmtrain, only_run, rows

QUIET = (*TINY, "loop.max_steps=3")
WARMUP = "schedule.warmup_steps=3: the warm-up takes all 3 steps of the run"
LR = "optimizer.lr=1e-06: 1/1,8"

PLUGIN = '''
from dataclasses import dataclass, replace

from llmtrain.data import IGNORE, Corpus
from llmtrain.data.python_docs import PythonDocs
from llmtrain.data.sequences import Rows, Stream
from llmtrain.lora import Lora


class Masked(Stream):
    def __init__(self, sequences):
        self.__dict__.update(sequences.__dict__)

    def gather(self, indices):
        inputs, targets, *_ = super().gather(indices)
        targets[:] = IGNORE
        return Rows(inputs, targets)


@dataclass(frozen=True)
class Answers(PythonDocs):
    """Documents of which nothing is a target."""

    def build(self, tokenizer):
        corpus = super().build(tokenizer)
        return replace(corpus, train=Masked(corpus.train))


@dataclass(frozen=True)
class Frozen(Lora):
    def apply(self, model, generators):
        model.requires_grad_(False)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plugin and a config group of the user's own."""
    (tmp_path / "masked_answers.py").write_text(PLUGIN)
    docs = Path(__file__).parents[2] / "conf" / "data" / "python_docs.yaml"
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "answers.yaml").write_text(
        docs.read_text().replace("llmtrain.data.python_docs.PythonDocs", "masked_answers.Answers")
    )
    (tmp_path / "mine" / "lora").mkdir()
    (tmp_path / "mine" / "lora" / "frozen.yaml").write_text("_target_: masked_answers.Frozen\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_data_without_a_single_target_end_the_command(folder: Path) -> None:
    """In a process of its own, as a user would see it."""
    done = llmtrain(
        "train", *QUIET, "--config-dir", "mine", "data=answers", "plugins=[masked_answers]", cwd=folder, check=2
    )
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("llmtrain: "))
    assert "data=masked_answers: every target of the 12 training sequences looked at is masked (-100)" in message
    assert "Traceback" not in done.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-dir", "mine", "lora=frozen", "plugins=[masked_answers]"], "every parameter of the model is frozen"),
        (["optimizer.rules=[{pattern:.,lr_multiplier:0}]"], "optimizer.rules: they multiply the learning rate"),
        (["schedule.warmup_steps=100000"], "schedule.warmup_steps=100000: the run ends after 3 steps, within"),
        (["data=shards", "data.path=a.bin", "data.validation_path=b.bin", "loop.eval_every=1"],
         "data.validation_path=b.bin: the validation data are in the training data from beginning to end"),
        (["data=text", "data.path=twice", "data.validation_fraction=0.5", "loop.eval_every=1"],
         "data.path=twice: the validation data are in the training data from beginning to end"),
    ],
)  # fmt: skip
def test_lint_errors_leave_nothing_behind(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    text = (Path(__file__).parents[2] / "data" / "lighthouse.txt").read_bytes()
    (folder / "a.bin").write_bytes(b"".join(bytes([byte, 0]) for byte in text))
    shutil.copyfile("a.bin", "b.bin")
    (folder / "twice").mkdir()
    for name in ("one.txt", "two.txt"):
        (folder / "twice" / name).write_bytes(text)
    before = sorted(folder.iterdir())
    for verb in ("train", "plan"):
        status = main([verb, *QUIET, *arguments])
        captured = capfd.readouterr()
        assert (status, "Traceback" in captured.err) == (2, False)
        assert message in captured.err + captured.out
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_warnings_are_seen_and_recorded(tmp_path: Path) -> None:
    done = llmtrain(
        "train", *QUIET, "schedule.warmup_steps=3", "optimizer.lr=1e-6", "loop.eval_batches=2", cwd=tmp_path
    )
    run = only_run(tmp_path / "runs")
    warnings = [row for row in rows(run) if row.get("event") == "warning"]
    assert [(row["step"], row["key"]) for row in warnings] == [
        (0, "schedule.warmup_steps"), (0, "optimizer.lr"), (0, "loop.eval_batches"),
    ]  # fmt: skip
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("step"))
    for row, text in zip(warnings, (WARMUP, LR, "loop.eval_batches=2: has no effect: "), strict=True):
        assert row["message"].startswith(text)
        assert f"warning: {row['message']}" in lines[:first]  # after the header, before the first step
        assert f"warning: {row['message']}" in (run / "train.log").read_text()
    done = llmtrain("plan", *QUIET, "schedule.warmup_steps=3", cwd=tmp_path)
    assert f"warning: {WARMUP}" in done.stdout


def test_resume_warns_of_its_changes_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run.compose(*QUIET, "schedule.warmup_steps=3", f"run_dir={tmp_path / 'run'}").train().run_dir

    def warned(*changes: str) -> list[str]:
        capfd.readouterr()
        assert main(["resume", str(run), *changes]) == 0
        return [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: ")]

    assert warned("loop.max_steps=5") == []  # the warm-up is shorter than the run now
    rate, batches = warned("loop.max_steps=6", "loop.eval_batches=1", "optimizer.lr=1")
    assert rate.startswith("warning: optimizer.lr=1: ")
    assert batches.startswith("warning: loop.eval_batches=1: has no effect: ")
    assert warned("loop.max_steps=7") == []  # the rate of 1 has been spoken of
    (length,) = warned("schedule.warmup_steps=7")
    assert length.startswith("warning: schedule.warmup_steps=7: ")
    warnings = [row for row in rows(run) if row.get("event") == "warning"]
    assert [(row["step"], row["key"]) for row in warnings] == [
        (0, "schedule.warmup_steps"), (5, "optimizer.lr"), (5, "loop.eval_batches"), (7, "schedule.warmup_steps"),
    ]  # fmt: skip


@pytest.mark.slow
def test_each_job_of_a_sweep_shows_its_warnings(tmp_path: Path) -> None:
    llmtrain("train", "-m", *QUIET, "loop.eval_batches=2", "optimizer.lr=1e-3,10", cwd=tmp_path)
    jobs = [path.parent for path in tmp_path.glob("runs/sweeps/*/*/config.yaml")]
    found = {
        stored_config.load(job / "config.yaml")["optimizer"]["lr"]: {
            row["key"] for row in rows(job) if row.get("event") == "warning"
        }
        for job in jobs
    }
    assert found == {1e-3: {"loop.eval_batches"}, 10.0: {"loop.eval_batches", "optimizer.lr"}}
