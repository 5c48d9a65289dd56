"""What a terminal would obey, in prompts, texts, names and errors, is shown: letters, not control characters."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.faults.victims import STANDARD
from tests.helpers.cli import rows
from tests.helpers.launcher import Launcher

ESCAPE = "\x1b]0;owned\x07\x1b[2J[bold red]loud[/]\x9b31m\u202e"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def assert_shown(text: str) -> None:
    """The escape sequence is there in letters, markup as it is, and no control character."""
    assert r"\x1b]0;owned\x07\x1b[2J[bold red]loud[/]\x9b31m\u202e" in text
    assert not OBEYED.search(text), OBEYED.findall(text)


def test_control_characters_of_prompts_names_and_paths_are_shown(launcher: Launcher, tmp_path: Path) -> None:
    """In plain output and log, of the run, its samples, its resume, its report; the files of data have it as it is."""
    folder = tmp_path / f"run {ESCAPE.replace('/', '')}"
    text = tmp_path / f"text {ESCAPE.replace('/', '')}.txt"
    (tmp_path / "text.txt").rename(text)
    arguments = [a for a in STANDARD if not a.startswith("data.path")]
    quoted = [
        f"{key}='{value}'" for key, value in (("name", ESCAPE), ("data.path", text.name), ("run_dir", folder.name))
    ]
    output = launcher.run("train", *arguments, *quoted, f"loop.sample_prompt={ESCAPE}", "loop.max_steps=4",
                          "loop.sample_every=2")  # fmt: skip
    assert_shown(output)
    assert_shown((folder / "train.log").read_text())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in samples} == {ESCAPE}
    for verb in (("resume", folder.name, "loop.max_steps=6"), ("report", folder.name), ("resume", folder.name)):
        output = launcher.run(*verb)
        assert not OBEYED.search(output), (verb, OBEYED.findall(output))
    assert_shown((folder / "train.log").read_text())


@pytest.mark.slow
def test_control_characters_of_a_sweep_are_shown(launcher: Launcher, tmp_path: Path) -> None:
    quoted = (f"name='{ESCAPE}'", f"loop.sample_prompt='{ESCAPE}'")
    output = launcher.run("train", "-m", *STANDARD, *quoted, "loop.max_steps=2", "optimizer.lr=1e-3")
    assert_shown(output)
    output = launcher.run("train", "-m", *STANDARD, *quoted, "loop.max_steps=2", "optimizer.lr=1e-3")
    assert "finished already" in output
    assert not OBEYED.search(output), OBEYED.findall(output)


@pytest.mark.parametrize(
    "arguments",
    [
        (f"train{ESCAPE}",),
        ("train", f"optimizer={ESCAPE}"),
        ("train", f"optimizer.{ESCAPE}=1"),
        ("train", f"loop.max_steps={ESCAPE}"),
        ("train", f"--{ESCAPE}"),
        ("train", *STANDARD, f"data.path='{ESCAPE}'"),
        ("resume", f"nowhere{ESCAPE}"),
        ("generate", f"nowhere{ESCAPE}"),
        ("report", f"nowhere{ESCAPE}"),
    ],
    ids=lambda arguments: arguments[0][:8] + (arguments[1][:8] if len(arguments) > 1 else ""),
)
def test_control_characters_in_errors_are_shown(launcher: Launcher, arguments: tuple[str, ...]) -> None:
    output = launcher.start(*arguments).wait(2)
    assert not OBEYED.search(output), OBEYED.findall(output)


def test_control_characters_in_messages_of_a_plugin_are_shown(launcher: Launcher, tmp_path: Path) -> None:
    """The message of an event, and of the error that ends a run."""
    (tmp_path / "broken").touch()
    arguments = ("objective._target_=objectives.Broken", "plugins=[objectives]", f"+objective.message='{ESCAPE}'")
    output = launcher.start("train", *STANDARD, *arguments, "run_dir=run").wait(1)
    assert not OBEYED.search(output), OBEYED.findall(output)
    assert not OBEYED.search((tmp_path / "run" / "train.log").read_text())


def on_a_terminal(*arguments: str, cwd: Path) -> str:
    """What the command writes to a terminal."""
    master, slave = os.openpty()
    written = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(master, 65536):
                written.extend(chunk)
        except OSError:  # Linux says so when the other side has closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    command = [sys.executable, "-m", "llmtrain", *arguments]
    status = subprocess.run(command, cwd=cwd, stdin=slave, stdout=slave, stderr=slave, env=environment).returncode
    os.close(slave)
    reader.join(30)
    os.close(master)
    assert status == 0, written
    return written.decode("utf-8")


@pytest.mark.slow
def test_a_terminal_gets_no_control_sequences_but_colours(launcher: Launcher, tmp_path: Path) -> None:
    """Of the run as of generated text: bytes that a model trained on nothing makes are mostly control characters."""
    quoted = (
        f"name='{ESCAPE}'",
        f"loop.sample_prompt={ESCAPE}",
        "loop.max_steps=4",
        "loop.sample_every=2",
        "run_dir=run",
    )
    live = on_a_terminal("train", *STANDARD, *quoted, cwd=tmp_path)
    generated = on_a_terminal("generate", "run", f"prompt={ESCAPE}", "max_tokens=60", "temperature=5", "top_k=0",
                              cwd=tmp_path)  # fmt: skip
    for text in (live, generated):
        assert "\x1b]0;" not in text
        assert "\x1b[2J" not in text
        left = COLOURS.sub("", text).replace("\r", "")
        assert not OBEYED.search(left), OBEYED.findall(left)
    assert r"\x1b]0;owned" in COLOURS.sub("", live)
    assert r"\x1b]0;owned" in generated
    assert rows(tmp_path / "run")
