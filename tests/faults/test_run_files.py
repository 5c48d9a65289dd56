"""Links, pipes, devices and values of other types in a run directory: nothing hangs, nothing outside of it changes."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llmtrain.cli.main import main
from tests.faults.victims import STANDARD, steps
from tests.helpers.launcher import Launcher

RESUME = ("resume", "run", "loop.max_steps=6", "loop.sample_every=2")
VERIFY, REPORT, GENERATE = ("verify", "run", "replay_steps=0"), ("report", "run"), ("generate", "run", "max_tokens=1")


@pytest.fixture(scope="module")
def made(server: Launcher) -> Path:
    """A finished run with samples and several checkpoints; its tokenizer is made of a file."""
    from llmtrain.tokenizer.bpe import write_ranks

    (server.folder / "ranks.tiktoken").write_bytes(write_ranks({bytes([byte]): byte for byte in range(256)}))
    own = ("tokenizer=tiktoken", "tokenizer.encoding=ranks.tiktoken", "tokenizer.pattern=gpt2")
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=2", "loop.sample_every=2", "run_dir=made")
    server.run("train", *STANDARD, *own, *every, "loop.max_steps=4")
    return server.folder / "made"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


READERS = {
    ".lock": (RESUME, REPORT), "metrics.jsonl": (RESUME, REPORT), "summary.json": (RESUME, REPORT),
    "config.yaml": (RESUME, REPORT), "environment.json": (RESUME, REPORT), "samples.jsonl": (RESUME,),
    "train.log": (RESUME,), "checkpoints/step-00000004/state.json": (VERIFY,),
    "checkpoints/step-00000004/manifest.json": (GENERATE,), "tokenizer/manifest.json": (GENERATE,),
    "tokenizer/ranks.tiktoken": (GENERATE,),
}  # fmt: skip


def test_pipes_and_devices_hang_no_verb(launcher: Launcher, made: Path, tmp_path: Path) -> None:
    victims = []
    for number, (name, verbs) in enumerate(READERS.items()):
        kinds = ("pipe", "zero") if name in ("summary.json", "tokenizer/ranks.tiktoken") else ("pipe",)
        for kind in kinds:
            run = Path(shutil.copytree(made, tmp_path / f"{kind}-{number}" / "run"))
            (run / name).unlink(missing_ok=True)
            os.mkfifo(run / name) if kind == "pipe" else (run / name).symlink_to("/dev/zero")
            victims += [launcher.start(*verb, cwd=run.parent) for verb in verbs]
    for victim in victims:
        output = victim.wait(seconds=100)
        assert victim.returncode in (0, 1, 2), output
        assert "Traceback" not in output


def test_a_checkpoint_folder_outside_of_the_run_is_not_touched(launcher: Launcher, run: Path, tmp_path: Path) -> None:
    for name in ("checkpoints", "tensorboard", "profile", "tokenizer"):
        outside = tmp_path / "outside" / name
        outside.parent.mkdir(exist_ok=True)
        shutil.move(run / name, outside) if (run / name).exists() else outside.mkdir()
        (outside / ".tmp-mine").mkdir()
        (run / name).symlink_to(outside)
        before = sorted(tmp_path.glob("outside/**/*"))
        assert f"run/{name}: a link, to {outside}" in launcher.run(*RESUME, status=2)
        assert sorted(tmp_path.glob("outside/**/*")) == before
        (run / name).unlink()
        shutil.move(outside, run / name)
        (run / name / ".tmp-mine").rmdir()


def test_a_checkpoint_that_is_a_link_is_removed_and_not_what_it_leads_to(
    launcher: Launcher, run: Path, tmp_path: Path
) -> None:
    newest = f"step-{steps(run)[-1]:08d}"
    shutil.move(run / "checkpoints" / newest, tmp_path / newest)
    (run / "checkpoints" / newest).symlink_to(tmp_path / newest)
    launcher.run("resume", "run", "loop.max_steps=8", "checkpoint.every_steps=1")
    assert not os.path.lexists(run / "checkpoints" / newest)
    assert len(list((tmp_path / newest).iterdir())) == 5
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "train.log", "samples.jsonl"])
def test_a_file_with_another_name_is_not_written_through(
    launcher: Launcher, run: Path, tmp_path: Path, name: str
) -> None:
    """As in a copy made of hard links, ``cp -al``."""
    (tmp_path / "other").hardlink_to(run / name)
    before = (tmp_path / "other").read_bytes()
    launcher.run("resume", "run", "loop.max_steps=5")
    assert (tmp_path / "other").read_bytes() == before
    if name != ".lock":
        assert (run / name).stat().st_size > len(before)


BOMB = "b0: &b0 [x,x]\n" + "".join(f"b{n}: &b{n} [{','.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("name", "content", "verbs"),
    [
        ("summary.json", '{"exit_reason": "finished", "step": "4"}', "report"),
        ("summary.json", '{"exit_reason": ["finished"], "step": 4}', "report"),
        ("summary.json", '{"tokens": 1' + "0" * 400 + "}", "report"),
        ("summary.json", "[" * 100_000, "report"),
        ("metrics.jsonl", '{"step": true}\n', "report resume"),
        ("metrics.jsonl", '{"step": 1, "tokens": "x", "loss": 1.0}\n', "report resume"),
        ("metrics.jsonl", '{"step": 1, "tokens": 1, "loss": [1.0]}\n', "report"),
        ("metrics.jsonl", '{"step": 1, "step": 2, "tokens": 1, "loss": 1.0}\n', "report"),
        ("metrics.jsonl", '{"step": 1, "tokens": 1, "val_loss": 1, "confusion": [[1]], "labels": [3]}\n', "report"),
        ("metrics.jsonl", '{"step": 1, "tokens": 1, "val_loss": 1, "confusion": [[1]]}\n', "report"),
        ("samples.jsonl", "null\n", "resume"),
        ("samples.jsonl", '{"step": -1}\n', "resume"),
        ("environment.json", '{"resumes": [3]}', "report resume"),
        ("environment.json", '{"versions": {"torch": 2}}', "resume"),
        ("environment.json", '{"device": 7, "versions": []}', "resume"),
        ("config.yaml", "a: &a [*a]\n", "report resume"),
        ("config.yaml", "name: x\nname: y\n", "report resume"),
        ("config.yaml", "name: 2026-13-45\n", "report"),
        ("config.yaml", "name: 2026-11-21\n", "report resume"),
        ("config.yaml", "name: " + "9" * 10_000 + "\n", "report"),
        ("config.yaml", "name: 0x" + "f" * 10_000 + "\n", "report"),
        ("config.yaml", BOMB, "report resume"),
        ("tokenizer/manifest.json", '{"files": {"ranks.tiktoken": 3}}', "generate resume"),
    ],
)
def test_values_of_other_types_are_named_with_their_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, content: str, verbs: str
) -> None:
    monkeypatch.chdir(run.parent)
    (run / name).write_text(content)
    commands = {"report": ("report", "run", "plot=false"), "resume": RESUME, "generate": GENERATE}
    for verb in verbs.split():
        assert main(list(commands[verb])) == 2
        message = capsys.readouterr().err
        assert name in message
        assert "Traceback" not in message


def test_a_sparse_file_is_not_read_whole(launcher: Launcher, run: Path) -> None:
    for name, verb in (("summary.json", REPORT), ("metrics.jsonl", REPORT), ("config.yaml", RESUME),
                       ("checkpoints/step-00000004/manifest.json", GENERATE)):  # fmt: skip
        before = (run / name).read_bytes()
        os.truncate(run / name, 1 << 40)
        assert "Traceback" not in launcher.start(*verb).wait(seconds=60)
        (run / name).unlink()
        (run / name).write_bytes(before)


def test_a_renamed_checkpoint_is_not_intact(launcher: Launcher, run: Path) -> None:
    (run / "checkpoints" / "step-00000004").rename(run / "checkpoints" / "step-00000009")
    assert "step-00000009: holds step 4" in launcher.run(*VERIFY, status=1)
    assert "step-00000009: holds step 4" in launcher.run("resume", "run")
    assert json.loads((run / "summary.json").read_text())["step"] == 4
