"""The text that every Python carries: its split, and what is left out of it."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli.main import main
from llmtrain.config.older_versions import complete
from llmtrain.data import Corpus, python_prose
from llmtrain.data.cache.token_cache import prepare
from llmtrain.data.python_docs import PythonDocs, read_topics, split_topics
from llmtrain.data.python_prose import PythonProse
from llmtrain.tokenizer import Tokenizer
from tests.data.sources.test_python_prose import MODULE, PROSE

LONG = 8  # words; shorter paragraphs ("See also:") stand anywhere


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    return {"sequence_length": 64, "validation_fraction": 0.15, "shuffle": True, "cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python with little of its library, so that tests take no seconds."""
    folder = tmp_path / "library"
    (folder / "json").mkdir(parents=True)
    (folder / "argparse.py").write_text(MODULE, encoding="utf-8")
    (folder / "json" / "__init__.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.setattr(python_prose, "_library", lambda: folder)
    return folder


def validation_text(corpus: Corpus, tokenizer: Tokenizer) -> str:
    assert corpus.validation is not None
    return tokenizer.decode(corpus.validation.gather(np.arange(len(corpus.validation))).inputs.ravel().tolist())


def words(text: str) -> list[str]:
    return "".join(character if character.isalnum() else " " for character in text.lower()).split()


# --- the language reference -----------------------------------------------------------------------------------------


def test_no_paragraph_of_validation_is_in_training() -> None:
    train, validation = split_topics(0.15, "python_docs")
    training = " ".join(words("\n\n".join(train.values())))
    paragraphs = [text for topic in validation.values() for text in topic.strip().split("\n\n")]
    assert len(paragraphs) > 100
    for paragraph in paragraphs:
        row = words(paragraph)
        for start in range(len(row) - LONG + 1):
            assert " ".join(row[start : start + LONG]) not in training, paragraph


def test_the_topics_of_the_split_are_the_former_ones(common: dict[str, Any], byte: Tokenizer) -> None:
    """Only paragraphs of the validation text are left out: about a fifth."""
    before = PythonDocs(**common, remove_repeats=False).build(byte)
    now = PythonDocs(**common, remove_repeats=True).build(byte)
    assert before.validation is not None
    assert now.validation is not None
    assert now.train.tokens == before.train.tokens
    assert 0.7 < now.validation.tokens / before.validation.tokens < 0.9
    assert now.fingerprint != before.fingerprint
    assert PythonDocs(**common, remove_repeats=True).verify(byte).fingerprint == now.fingerprint


def test_runs_of_older_versions_keep_their_split(common: dict[str, Any], byte: Tokenizer) -> None:
    stored = {"data": {"_target_": "llmtrain.data.python_docs.PythonDocs", **common}}
    assert complete(stored)["data"]["remove_repeats"] is False
    option = PythonDocs(**common, remove_repeats=False)
    entry = prepare(option.source(), byte, 0.15, option.cache)  # as those versions did
    assert option.build(byte).fingerprint == entry.folder.name


def test_a_run_of_an_older_version_resumes_on_its_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    settings = ["model=tiny", "tokenizer=byte", "loop.max_steps=1", "loop.eval_batches=1", "loop.sample_every=0"]
    assert main(["train", *settings, "data.remove_repeats=false", f"run_dir={run}"]) == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  remove_repeats: false\n", ""))
    capfd.readouterr()
    assert main(["resume", str(run), "loop.max_steps=2"]) == 0
    assert "finished at step 2 of 2" in capfd.readouterr().out
    assert main(["resume", str(run), "loop.max_steps=3", "data.remove_repeats=true"]) == 2  # other data


@pytest.mark.parametrize("fraction", [0.001, 0.99])
def test_some_topics_train_and_some_validate(fraction: float) -> None:
    train, validation = split_topics(fraction, "python_docs")
    assert train
    assert validation


def test_without_validation_every_topic_trains(common: dict[str, Any], byte: Tokenizer) -> None:
    corpora = [
        PythonDocs(**common | {"validation_fraction": 0.0}, remove_repeats=remove).build(byte) for remove in (0, 1)
    ]
    assert [corpus.validation for corpus in corpora] == [None, None]
    assert corpora[0].fingerprint == corpora[1].fingerprint


def test_a_python_without_the_reference_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    split_topics.cache_clear()
    monkeypatch.chdir(tmp_path)
    for option in ("python_docs", "python_prose"):
        assert main(["train", "model=tiny", "tokenizer=byte", f"data={option}", "loop.max_steps=1"]) == 2
        assert f"data={option}: this Python has no pydoc_data" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- with the prose of the library -----------------------------------------------------------------------------------


def test_prose_validates_on_the_text_of_python_docs(
    small_library: Path, common: dict[str, Any], byte: Tokenizer
) -> None:
    docs, prose = PythonDocs(**common, remove_repeats=True).build(byte), PythonProse(**common).build(byte)
    assert validation_text(docs, byte) == validation_text(prose, byte)
    assert prose.train.tokens == docs.train.tokens + len("\n\n".join(PROSE)) + 2  # once, though it is in two files
    assert PythonProse(**common).verify(byte).fingerprint == prose.fingerprint


def test_prose_without_validation_has_every_topic(small_library: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    corpus = PythonProse(**common | {"validation_fraction": 0.0}).build(byte)
    assert corpus.validation is None
    assert corpus.train.tokens > sum(len(text.encode()) for text in read_topics("python_prose").values())


def test_prose_that_overlaps_with_validation_is_left_out(
    small_library: Path, common: dict[str, Any], byte: Tokenizer
) -> None:
    train = PythonProse(**common).build(byte).train.tokens
    _, validation = split_topics(0.15, "python_prose")
    copied = next(text for text in validation["debugger"].split("\n\n") if len(text.split()) > 30)
    (small_library / "argparse.py").write_text(f"{MODULE}\n# {' '.join(copied.split()[2:])}\n", encoding="utf-8")
    corpus = PythonProse(**common).build(byte)
    assert corpus.train.tokens == train


def test_a_changed_file_changes_the_fingerprint(small_library: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    before = PythonProse(**common).build(byte)
    (small_library / "argparse.py").write_text(MODULE.replace("explains", "describes"), encoding="utf-8")
    assert PythonProse(**common).build(byte).fingerprint != before.fingerprint


def test_missing_parts_are_noted(small_library: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    (note,) = PythonProse(**common).build(byte).notes
    assert note.startswith(f"{small_library} lacks")
    assert "idlelib" in note
    for file in small_library.rglob("*.py"):
        file.unlink()
    (note,) = PythonProse(**common).build(byte).notes
    assert "no sources of the library: the text is the language reference alone" in note


def test_the_library_has_two_megabytes_of_prose(common: dict[str, Any]) -> None:
    option = PythonProse(**common)
    texts = [piece.text for piece in option.source().pieces()]
    assert 1.5e6 < sum(map(len, texts)) < 4e6
    assert option.source().content == option.source().content
    assert any("argument parsing" in text for text in texts)  # argparse
    paragraphs = [paragraph for text in texts[len(split_topics(0.15, "x")[0]) :] for paragraph in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
