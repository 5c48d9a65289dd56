"""Keys and their descriptions, as ``--help`` shows them: those of the options are in ``test_config.py``."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmtrain.cli.help import ON_RESUME, commented, written
from llmtrain.cli.main import main
from llmtrain.run.changes import FIXED

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("verb", ["train", "plan", "generate", "chat", "predict", "export", "verify", "report"])
def test_every_key_of_every_verb_is_described(verb: str) -> None:
    node = OmegaConf.load(CONF / f"{verb}.yaml")
    assert not [key for key in node if key not in commented([CONF], verb) and key not in ("_target_", "defaults")]


def test_comments_of_keys_are_read_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "# what it is\na: 1   # one\n       # and more\n# not of a key\nc:\nd: {e: 1}  # a dict\n"
    )
    assert commented([tmp_path], "a") == {"a": "one and more", "d": "a dict"}
    assert commented([tmp_path], "missing") == {}


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
