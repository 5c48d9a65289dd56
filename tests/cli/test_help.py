"""Keys and their descriptions, as ``--help`` shows them: those of the options are in ``test_config.py``."""

from pathlib import Path

import pytest
import yaml

from llmtrain.cli.help import ON_RESUME, commented, settings, written
from llmtrain.cli.main import main
from llmtrain.run.changes import FIXED

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("verb", ["train", "plan", "generate", "chat", "predict", "export", "verify", "report"])
def test_every_key_of_every_verb_is_described(verb: str) -> None:
    node = yaml.safe_load((CONF / f"{verb}.yaml").read_text(encoding="utf-8"))
    assert not [key for key in settings(node) if key not in commented([CONF], verb) and key != "defaults"]


def test_comments_of_keys_are_read_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "# what it is\na: 1   # one\n       # and more\n# not of a key\nc:\nd: {e: 1}  # a dict\n"
    )
    assert commented([tmp_path], "a") == {"a": "one and more", "d": "a dict"}
    assert commented([tmp_path], "missing") == {}


def test_keys_of_a_node_are_named_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a:\n  _target_: x\n  b: 1  # one\n  c: 2\n  # not of a key\nd: 3  # another\n")
    assert commented([tmp_path], "a") == {"a.b": "one", "d": "another"}
    assert settings(yaml.safe_load((tmp_path / "a.yaml").read_text())) == {"a.b": 1, "a.c": 2, "d": 3}


@pytest.mark.parametrize("verb", ["generate", "chat", "predict", "export", "verify"])
def test_help_lists_the_present_places_of_moved_files(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    output = capfd.readouterr().out
    assert "weights.path=null" in output
    assert "tokenizer.path=null" in output
    assert "_target_" not in output


@pytest.mark.parametrize(
    ("value", "text"),
    [("\n", '"\\n"'), ("", '""'), (None, "null"), (True, "true"), (5e-5, "5e-05"), ([1, "a"], "[1, a]"), ("a b", "a b"),
     ("${model.path}", "${model.path}")],
)  # fmt: skip
def test_help_writes_values_as_on_a_command_line(value: object, text: str) -> None:
    assert written(value) == text


def test_help_of_resume_needs_no_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "--help"]) == 0
    output = capfd.readouterr().out
    assert output.startswith("llmtrain resume RUN_DIR")
    assert all(line in output for line in ON_RESUME)


def test_help_of_resume_lists_the_keys_it_refuses() -> None:
    said = " ".join(ON_RESUME)
    assert not [key for key in FIXED if key.removesuffix(".") not in said]
