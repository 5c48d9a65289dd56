"""Samples of text during training: what cannot be sampled is said before step 1, or left out with a message."""

import dataclasses
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from llmtrain import Run
from llmtrain.cli.main import main
from tests.helpers.cli import TINY, rows

SAMPLED = (*TINY, "loop.max_steps=3", "loop.sample_every=1", "loop.sample_tokens=3", "checkpoint.every_steps=0")


def test_a_diverged_model_is_not_sampled_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # every product of two weights overflows fp32, so that no position depends on the text, nor on the kernel, to be NaN
    assert main(["train", *SAMPLED, "optimizer.lr=1e30", "schedule=constant", "run_dir=run"]) == 0
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    left_out = [row for row in rows(tmp_path / "run") if row.get("event") == "no_sample"]
    assert len(left_out) == 3
    assert all("the model's output is not finite" in row["message"] for row in left_out)
    for arguments in (["generate", "run", "prompt=a"], ["generate", "run", "prompt=a", "temperature=0"]):
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith("llmtrain: the model's output is not finite")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sample_temperature=nan", r"sample_temperature=nan: must be 0 \(greedy\) or more, and finite"),
        ("sample_temperature=inf", r"sample_temperature=inf: must be 0 \(greedy\) or more, and finite"),
        ("sample_prompt=\udcff\udcfe", r"sample_prompt=\\udcff\\udcfe: holds bytes that are not UTF-8"),
    ],
)
def test_settings_of_samples_are_checked(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Run.compose(*SAMPLED).loop, **as_values(override))


def as_values(override: str) -> dict[str, object]:
    key, _, value = override.partition("=")
    return {key: float(value) if value in ("nan", "inf") else value}


class WordsAlone:
    """A tokenizer that knows two words and has nothing for others, as the library lets one be made."""

    def __init__(self) -> None:
        self.words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="missing"))

    def encode(self, text: str) -> list[int]:
        return self.words.encode(text).ids


def test_a_prompt_that_the_tokenizer_cannot_encode_is_refused_before_training() -> None:
    loop = dataclasses.replace(Run.compose(*SAMPLED).loop, sample_prompt="Qué")
    with pytest.raises(ValueError, match=r"loop.sample_prompt='Qué': the tokenizer cannot encode it .*sample_every=0"):
        loop.check_prompt(WordsAlone())
    dataclasses.replace(loop, sample_every=0).check_prompt(WordsAlone())
    dataclasses.replace(loop, sample_prompt="a").check_prompt(WordsAlone())
