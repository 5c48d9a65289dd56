"""Text from files of every kind: rows, text of other endings, other encodings; and an account of what is not read."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from llmtrain.data import Corpus
from llmtrain.data.order.document_split import Split
from llmtrain.data.text import Text, TextFiles
from llmtrain.tokenizer import Tokenizer
from tests.data.sources.test_records import write
from tests.data.test_text import text_of

ROWS: list[dict[str, Any]] = [{"text": "one", "id": "1"}, {"text": "two\nlines", "id": "2"}, {"text": "", "id": "3"}]


def read(path: Path, byte: Tokenizer, **changes: Any) -> tuple[list[str], Corpus]:
    keys = {"validation_path": None, "files": TextFiles.all, "text_column": None, "separator": "<|endoftext|>"}
    lengths = {"split": Split.tokens, "sequence_length": 1, "validation_fraction": 0.0, "shuffle": False}
    cache = {"cache_dir": str(path.parent / "cache")}
    corpus = Text(path=str(path), **(keys | lengths | cache | changes)).build(byte)
    return text_of(corpus, byte).split("<|endoftext|>"), corpus


def refused(path: Path, byte: Tokenizer, **changes: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(path, byte, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".ndjson.zst", ".json", ".csv", ".tsv", ".csv.gz", ".parquet"]
)
def test_a_row_is_a_document(tmp_path: Path, byte: Tokenizer, suffix: str) -> None:
    documents, corpus = read(write(tmp_path / f"a{suffix}", ROWS), byte)
    assert documents == ["one", "two\nlines"]
    assert "2 documents, 14 tokens" in corpus.description
    assert "columns that are not read: id" in corpus.notes
    assert f"1 rows without a text (null or empty) are left out: {tmp_path / f'a{suffix}'}" in corpus.notes
    assert read(tmp_path / f"a{suffix}", byte)[1].notes == corpus.notes  # also from the cache


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"content": "yes", "id": 1}, None, "yes"),
        ({"Text": "yes", "id": "no"}, None, "yes"),
        ({"story": "yes"}, None, "yes"),
        ({"a": "no", "b": "yes"}, "b", "yes"),
    ],
)
def test_the_column_is_found_or_named(
    tmp_path: Path, byte: Tokenizer, row: dict[str, Any], column: str | None, expected: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert read(path, byte, text_column=column)[0] == [expected]


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        (
            [{"text": "a", "content": "b"}],
            None,
            "a.jsonl:1: which column is the text? There are text, content; name it",
        ),
        ([{"a": "x", "b": "y"}], None, "There are a, b; name it with data.text_column=NAME"),
        ([{"messages": []}], None, "conversations and instructions are for data=instruction"),
        ([{"text": "a"}], "txt", "a.jsonl:1: there is no column txt; did you mean text?"),
        ([{"text": "a"}, {"text": 5}], None, "a.jsonl:2: text is 5 (int), where a text is needed"),
        ([{"text": "a"}, {"text": "\ud800"}], None, "a.jsonl:2: text has half of a surrogate pair"),
        ([], None, "there is no text"),
    ],
)
def test_rows_without_a_clear_text_are_refused(
    tmp_path: Path, byte: Tokenizer, rows: list[dict[str, Any]], column: str | None, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert message in refused(path, byte, text_column=column)


def test_files_of_any_ending_are_read_and_the_others_named(tmp_path: Path, byte: Tokenizer) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {
        "a.py": b"code", "b.html.gz": gzip.compress(b"html"), "c": b"bare", "d.log": "log".encode("utf-16"),
        "e.zst": zstandard.compress(b"zst"), "f.json": b'{\n"not": "rows"}', "g.csv": b"id,year\n1,2\n",
        "h.png": b"\x89PNG\0", "i.pdf": b"%PDF\xff", "j.gz": b"no gzip", "k.txt": b" \n",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    documents, corpus = read(folder, byte)
    assert documents == ["code", "html", "bare", "log", "zst", '{\n"not": "rows"}']
    text = "\n".join([*corpus.notes, *corpus.left_out[0].notes()])
    for part in (
        "neither UTF-8 nor UTF-16 text: 1 (5 B): i.pdf", "binary, not text: 1 (5 B): h.png",
        "damaged or cut: Not a gzipped file (b'no'): 1 (7 B): j.gz",
        "rows without a column text or content (data.text_column=NAME names another): 1 (12 B): g.csv",
        f"1 files without a text (nothing but white space): {folder / 'k.txt'}",
    ):  # fmt: skip
        assert part in text, text


def test_a_text_file_of_a_folder_that_is_no_text_is_left_out(tmp_path: Path, byte: Tokenizer) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    large = ("ü€🙂 line\n" * (1 << 18)).encode()  # more than is looked at from the beginning
    middle, end = len(large) * 7 // 8, len(large) - 100
    contents = {
        "a.txt": b"text", "b.txt": b"%PDF" * 50 + b"\0", "c.md": b"gr\xfc\xdfe", "d.text.gz": gzip.compress(b"a\0"),
        "e.md": large[:middle] + bytes(end - middle) + large[end:],
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for _ in range(2):  # the second time from what is remembered
        documents, corpus = read(folder, byte)
        assert documents == ["text"]
        binary, encoding = corpus.left_out[0].notes(like_text=True)
        assert "left out, binary, not text, though its name says so: 3 (" in binary
        assert binary.endswith("): b.txt, d.text.gz, e.md")
        assert "neither UTF-8 nor UTF-16 text: 1 (5 B): c.md" in encoding
    assert "b.txt: byte 200 is NUL: a binary file (or UTF-16), not UTF-8 text; name a file of text" in refused(
        folder / "b.txt", byte
    )
    assert "remove it, or name them with a glob" in refused(folder / "*.txt", byte)


def test_damage_that_no_sample_shows_is_refused_with_a_remedy(tmp_path: Path, byte: Tokenizer) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    large = bytearray(("ü€🙂 line\n" * (1 << 18)).encode())
    (folder / "a.txt").write_bytes(large)
    corpus = read(folder, byte)[1]
    assert not corpus.left_out[0].reasons
    large[-10:-5] = bytes(5)
    (folder / "a.txt").write_bytes(large)
    message = refused(folder, byte)
    assert f"a.txt: byte {len(large) - 10} is NUL" in message
    assert "remove it, or name them with a glob" in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_decoded(tmp_path: Path, byte: Tokenizer, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße, 世界 🙂\r\n".encode(encoding))
    assert read(path, byte)[0] == ["Grüße, 世界 🙂\r\n"]


def test_a_file_that_is_named_is_read_or_refused_with_the_reason(tmp_path: Path, byte: Tokenizer) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\0")
    os.mkfifo(tmp_path / "pipe")
    assert "a.png: byte 4 is NUL: a binary file" in refused(tmp_path / "a.png", byte)
    assert "pipe: not a regular file" in refused(tmp_path / "pipe", byte)


def test_validation_path_names_text_for_validation(tmp_path: Path, byte: Tokenizer) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "held.txt"):
        (folder / name).write_text(name)
    documents, corpus = read(folder, byte, validation_path=str(folder / "held.txt"), validation_fraction=0.5)
    assert documents == ["a.txt", "b.txt"]
    assert corpus.validation is not None
    assert corpus.validation.tokens == len("held.txt") + 1
    other = read(folder, byte, validation_path=str(folder / "b.txt"))[1]
    assert other.fingerprint != corpus.fingerprint
    assert "all of its files are for validation" in refused(folder, byte, validation_path=str(folder))


def test_each_of_six_files_gives_its_share(tmp_path: Path, byte: Tokenizer) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, size in enumerate((40_000, 9_000, 90_000, 3_000, 1_500, 20_000)):
        (folder / f"{number}.txt").write_text(f"line of file {number}.\n" * (size // 20))
    corpus = read(folder, byte, validation_fraction=0.1)[1]
    assert corpus.validation is not None
    assert corpus.validation.tokens / (corpus.validation.tokens + corpus.train.tokens) == pytest.approx(0.1, abs=0.003)
    assert "of the tokens: the end of 6 of 6 documents; from 2.txt 10.0%, 0.txt" in corpus.split
    for number in range(40):
        (folder / f"small{number}.txt").write_text(f"line of file {number}.\n" * 20)
    mixed = read(folder, byte, validation_fraction=0.1)[1].split
    assert re.match(r"10\.0% of the tokens: \d of 46 documents, and the end of \d more; from 2\.txt 10\.0%, ", mixed)
    assert re.search(r", … \(\d+ sources\)$", mixed)
    text = byte.decode(corpus.validation.gather(np.arange(len(corpus.validation))).inputs.ravel().tolist())
    assert all(part.startswith("line of file") for part in text.split("<|endoftext|>"))  # cut at lines
