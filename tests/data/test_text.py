"""The options that tokenise text: what they read, how they split it, what they say when they cannot."""

import gzip
import json
import re
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from llmtrain.data import Corpus
from llmtrain.data.order.document_split import Split
from llmtrain.data.python_docs import PythonDocs
from llmtrain.data.python_stdlib import PythonStdlib
from llmtrain.data.sources.files import read_memo, write_memo
from llmtrain.data.text import Text, TextFiles
from llmtrain.tokenizer import Tokenizer
from tests.data.harm import flip_unnoticed

SEPARATOR = "<|endoftext|>"


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    return {
        "sequence_length": 4,
        "validation_fraction": 0.0,
        "shuffle": True,
        "cache_dir": str(tmp_path / "cache"),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text("second")
    (folder / "a.md").write_text("first")
    (folder / "sub" / "c.text.gz").write_bytes(gzip.compress(b"third"))
    (folder / "sub" / "d.txt.zst").write_bytes(zstandard.compress(b"fourth"))
    (folder / "empty.txt").write_text("")
    (folder / "e.json").write_text("a text")
    (folder / "f.bin").write_bytes(b"a\0b")
    (folder / ".hidden" / "g.txt").write_text("no text")
    return folder


def text_of(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """What is trained on, but for the last tokens, which fill no sequence."""
    inputs = corpus.train.gather(np.arange(len(corpus.train))).inputs
    return tokenizer.decode(inputs.ravel().tolist())


def build(path: Path | str, common: dict[str, Any], tokenizer: Tokenizer, separator: str = SEPARATOR) -> Corpus:
    return text_option(path, common, separator).build(tokenizer)


def text_option(path: Path | str, common: dict[str, Any], separator: str = SEPARATOR, **changes: Any) -> Text:
    keys = {"validation_path": None, "files": TextFiles.all, "text_column": None, "split": Split.tokens}
    return Text(path=str(path), separator=separator, **(common | keys | changes))


# --- what is read ------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_of_its_file_names(folder: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    corpus = build(folder, common | {"sequence_length": 1}, byte)
    assert text_of(corpus, byte) == "first<|endoftext|>second<|endoftext|>a text<|endoftext|>third<|endoftext|>fourth"
    assert "5 documents, 33 tokens" in corpus.description
    assert corpus.validation is None
    left_out, _ = corpus.left_out
    assert left_out.notes() == [
        f"data.path={folder}: left out, hidden: 1 (0 B): .hidden",
        f"data.path={folder}: left out, empty: 1 (0 B): empty.txt",
        f"data.path={folder}: left out, binary, not text: 1 (3 B): f.bin",
    ]
    assert left_out.notes(like_text=True) == []
    assert left_out.brief() == f"data.path={folder}: left out: 1 hidden; 1 empty; 1 binary, not text"


def test_plain_reads_what_older_versions_read(folder: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    (folder / "rows.txt").symlink_to(folder / "a.md")
    (folder / "linked").symlink_to(folder / "sub")
    option = text_option(folder, common | {"sequence_length": 1}, files=TextFiles.plain, split=Split.documents)
    corpus = option.build(byte)
    assert text_of(corpus, byte) == "<|endoftext|>".join(["first", "second", "first", "third", "fourth"])
    content = json.loads(option.source().content)
    assert [content[0], content[2], len(content[1])] == [SEPARATOR, ["", "", "", "", ".gz", ".zst"], 6]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("b.txt", "second"),
        ("e.json", "a text"),  # a file that is named is taken, whatever its name
        ("*.txt", "second"),
        ("[ab].*", "first<|endoftext|>second"),
        ("sub*", "third<|endoftext|>fourth"),
        ("**/*.zst", "fourth"),
    ],
)
def test_a_file_and_a_pattern_are_read(
    folder: Path, common: dict[str, Any], byte: Tokenizer, pattern: str, expected: str
) -> None:
    corpus = build(folder / pattern, common | {"sequence_length": 1}, byte)
    assert text_of(corpus, byte) == expected


def test_a_name_with_glob_characters_is_a_name(tmp_path: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    (tmp_path / "a[1].txt").write_text("this one")
    (tmp_path / "a1.txt").write_text("not this one")
    assert text_of(build(tmp_path / "a[1].txt", common, byte), byte) == "this one"


def test_document_separator_splits_a_file(tmp_path: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one--two--")
    assert "2 documents, 8 tokens" in build(path, common, byte, "--").description
    assert "1 document, 11 tokens" in build(path, common, byte, "").description


def test_changed_content_is_tokenised_anew(tmp_path: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old content.")
    assert text_of(build(path, common, byte), byte) == "old content."
    path.write_text("new content, longer.")
    assert text_of(build(path, common, byte), byte) == "new content, longer."


def test_the_same_content_elsewhere_is_found_in_the_cache(
    tmp_path: Path, common: dict[str, Any], byte: Tokenizer
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same content")
        build(tmp_path / name, common, byte)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, common: dict[str, Any], byte: Tokenizer
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old content.")
    source = text_option(path, common, "").source()
    path.write_text("new content, longer.")
    with pytest.raises(ValueError, match=r"a\.txt: changed while it was read"):
        list(source.pieces())


# --- the split ---------------------------------------------------------------------------------------------------


def test_one_document_is_split_by_position(tmp_path: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    """The proportions of the short story in "Build a Large Language Model (From Scratch)": 5,145 tokens."""
    path = tmp_path / "a.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 123, 5145, np.uint8).tobytes())
    corpus = build(path, common | {"validation_fraction": 0.1, "sequence_length": 256}, byte)
    assert corpus.validation is not None
    assert (len(corpus.train), len(corpus.validation)) == (18, 2)
    assert corpus.train.tokens + corpus.validation.tokens == 5147  # both parts are ended
    assert corpus.split == "10.0% of the tokens: the end of a.txt"
    validation = byte.decode(corpus.validation.gather(np.arange(2))[0].ravel().tolist())
    assert path.read_text()[corpus.train.tokens - 1 :].startswith(validation)


def test_documents_are_split_by_document(tmp_path: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(f"{i:04d}" for i in range(20)))
    corpus = build(path, common | {"validation_fraction": 0.25}, byte)
    assert corpus.validation is not None
    assert corpus.validation.tokens == 25
    texts = byte.decode(corpus.validation.gather(np.arange(6)).inputs.ravel().tolist())
    assert re.fullmatch(r"(\d{4}<\|endoftext\|>){4}\d{4}", texts)
    former = text_option(path, common | {"validation_fraction": 0.25}, split=Split.documents).build(byte)
    assert former.validation is not None
    assert former.validation.gather(np.array([0]))[0].tolist() == [list(b"0003")]
    assert "20 documents, 75 tokens for training, 25 for validation" in corpus.description


# --- Python's own ------------------------------------------------------------------------------------------------


def test_python_docs_are_text_without_markup(common: dict[str, Any], gpt2: Tokenizer) -> None:
    from pydoc_data.topics import topics

    corpus = PythonDocs(**common | {"sequence_length": 64}, remove_repeats=True).build(gpt2)
    assert f"{len(topics)} documents" in corpus.description
    text = text_of(corpus, gpt2)
    title, first = [part for part in topics[min(topics)].split("\n\n") if part.strip()][:2]
    assert text.startswith(title.splitlines()[0])
    assert " ".join(first.split()) in text
    assert not any(line.startswith((" ", "|", "+-")) for line in text.splitlines())


def test_python_stdlib_is_the_source_of_the_library(common: dict[str, Any]) -> None:
    source = PythonStdlib(split=Split.tokens, **common).source()
    texts = [piece.text for piece in source.pieces()]
    library = Path(sysconfig.get_path("stdlib"))
    assert (library / "argparse.py").read_text(encoding="utf-8") in texts
    assert 5e6 < sum(map(len, texts)) < 30e6
    assert PythonStdlib(split=Split.tokens, **common).source().content == source.content


# --- verification ------------------------------------------------------------------------------------------------


def test_verify_reads_the_documents_again(
    tmp_path: Path, folder: Path, common: dict[str, Any], byte: Tokenizer
) -> None:
    option = text_option(folder, common)
    first = option.build(byte)
    assert option.verify(byte).fingerprint == first.fingerprint
    flip_unnoticed(folder / "a.md", 0, tmp_path / "cache" / "sha256.json")
    assert option.build(byte).fingerprint == first.fingerprint
    with pytest.raises(ValueError, match=r"a\.md: its content has changed, its size and modification time have not"):
        option.verify(byte)


def test_verify_reads_the_shards_again(tmp_path: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    option = PythonDocs(**common, remove_repeats=True)
    option.build(byte)
    ((shard, entry),) = ((path, path.parent) for path in (tmp_path / "cache").glob("*/train-00000.bin"))
    flip_unnoticed(shard, 10, tmp_path / "cache" / "tokens-u2-0.json")
    option.build(byte)
    with pytest.raises(ValueError, match=rf"{shard}: its content has changed, .*; remove {entry}, and the next start"):
        option.verify(byte)


def test_verify_reads_pythons_sources_again(tmp_path: Path, common: dict[str, Any]) -> None:
    option = PythonStdlib(split=Split.tokens, **common)
    content = option.source().content
    assert option.source(verify=True).content == content
    memo = tmp_path / "cache" / "sha256.json"
    known = read_memo(memo)
    (module,) = (name for name in known if name.endswith("/argparse.py"))
    known[module][1] = "0" * 64
    write_memo(memo, known)
    assert option.source().content != content  # the memo is trusted
    with pytest.raises(ValueError, match=r"argparse\.py: its content has changed"):
        option.source(verify=True)


def test_verify_makes_a_missing_cache_entry(common: dict[str, Any], byte: Tokenizer) -> None:
    option = PythonDocs(**common, remove_repeats=True)
    assert option.verify(byte).fingerprint == option.build(byte).fingerprint


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.txt", None, r"data\.path=.*nowhere\.txt: no such file or folder"),
        ("*.csv", None, r"data\.path=.*\*\.csv: no file matches"),
        ("", None, r"data\.path=.*: there is no text that can be read in this folder"),
        ("a.txt", b"", r"a\.txt: there is no text in it"),
        ("a.txt", b" \n", r"a\.txt: there is no text in it"),
        ("a.txt", b"ab\0c", r"a\.txt: byte 2 is NUL: a binary file"),
        ("a.txt", b"ab\xff", r"a\.txt: byte 2 is not UTF-8 \(invalid start byte\)"),
        (
            "a.txt",
            b"abc",
            r"data\.sequence_length=4: text .*a\.txt, 1 document: 4 tokens for training make no sequence, "
            r"which takes 5; give more text, or data\.sequence_length=3 or less",
        ),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, common: dict[str, Any], byte: Tokenizer, name: str, content: bytes | None, message: str
) -> None:
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(path, common, byte)


def test_a_validation_part_too_short_is_refused(tmp_path: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 30)
    with pytest.raises(ValueError, match=r"validation_fraction=0\.1: .* 3 tokens .* 0 for no validation, .*=2 or less"):
        build(path, common | {"validation_fraction": 0.1}, byte)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0: must be positive"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: must be at least 0"),
        ({"validation_fraction": -0.1}, "validation_fraction=-0.1: must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(common: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PythonDocs(**common | values, remove_repeats=True)
