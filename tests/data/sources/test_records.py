"""Records from files of every kind, and what is said of files that are not right."""

import csv
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard

from llmtrain.data.sources import records
from llmtrain.data.sources.records import Record, RecordReader, find_records

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "label": "a"},
    {"text": 'quoted, "so"\nand on\n', "label": "b"},
    {"text": "ä 世界 🙂 \u2028 \x0b", "label": ""},
    {"text": " spaces ", "label": "null"},
]
LINES = {".csv": [2, 3, 6, 7], ".jsonl": [1, 2, 3, 4], ".json": [1, 1, 1, 1]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    suffix = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
        return path
    if suffix in (".csv", ".tsv"):
        plain = path.with_name("plain")
        with plain.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)
        content = plain.read_bytes()
        plain.unlink()
    elif suffix == ".json":
        content = json.dumps(rows).encode()
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


def read(path: Path) -> list[Record]:
    return list(RecordReader().read(path))


def error(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=r".") as caught:
        read(path)
    return str(caught.value).removeprefix(f"{path}")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_file_type_gives_the_same_records(tmp_path: Path, suffix: str, compression: str) -> None:
    if suffix == ".parquet" and compression:
        return  # it is compressed inside
    path = write(tmp_path / f"data{suffix}{compression}", ROWS)
    records = read(path)
    assert [record.values for record in records] == ROWS
    if suffix == ".parquet":
        assert [record.origin for record in records] == [f"{path}: row {i}" for i in (1, 2, 3, 4)]
    elif suffix in LINES:
        assert [record.origin for record in records] == [f"{path}:{line}" for line in LINES[suffix]]


def test_records_are_read_across_blocks(tmp_path: Path) -> None:
    """Lines go across the blocks that a file is read in."""
    rows = [{"text": f"{i} " + "ä\n" * (i % 700), "n": str(i)} for i in range(4000)]
    for suffix in (".csv", ".jsonl", ".json", ".parquet"):
        assert [record.values for record in read(write(tmp_path / f"data{suffix}", rows))] == rows


def test_a_large_csv_field_is_read(tmp_path: Path) -> None:
    (record,) = read(write(tmp_path / "data.csv", [{"text": "x" * 300_000}]))
    assert len(record.values["text"]) == 300_000


def test_records_are_read_only_as_far_as_asked(tmp_path: Path) -> None:
    """What is broken further on is not read, and so not held either."""
    for name, good, bad in (("a.csv", "x\n1\n", '"\n'), ("a.jsonl", '{"x": "1"}\n', "{\n")):
        path = tmp_path / name
        path.write_text(good + bad)
        assert next(RecordReader().read(path)).values == {"x": "1"}


def test_records_of_json_have_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('\n[\n  {"a": 1,\n   "b": "x\\n"},\n\n {"a": [2]} ,{"a": null}\n]\n')
    records = read(path)
    assert [record.origin for record in records] == [f"{path}:{line}" for line in (3, 6, 6)]
    assert [record.values["a"] for record in records] == [1, [2], None]
    path.write_text("[]")
    assert read(path) == []


def test_json_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [record.origin for record in read(path)] == [f"{path}:1", f"{path}:2"]


def test_empty_lines_are_counted(tmp_path: Path) -> None:
    reader = RecordReader()
    for name, content in (("a.jsonl", '\n{"a": "1"}\n  \n{"a": "2"}\n\n'), ("a.csv", "\na\n1\n\n2\n\n")):
        (tmp_path / name).write_text(content)
        reader.blank = 0
        assert [record.values for record in reader.read(tmp_path / name)] == [{"a": "1"}, {"a": "2"}]
        assert reader.blank == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'a,b\n1,2\n\n1,2,3\n"x', ":4: 3 fields, and 2 columns (a, b)"),
        ("a.csv", 'a,b\n1,2\n1,"2\n3\n', ":3: not CSV as in RFC 4180"),
        ("a.csv", 'a,b\n1,"2"3\n', ":2: not CSV as in RFC 4180"),
        ("a.csv", "a,a\n1,2\n", ":1: the column 'a' occurs twice"),
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a": 1\n',
            ":3: not JSON: Expecting ',' delimiter (column 8); a line has to hold one",
        ),
        ("a.jsonl", '{"a": 1}\n[1]\n', ":2: [1] (list), where an object is needed"),
        ("a.jsonl", "[" * 100_000, ":1: not JSON: nested too deeply"),
        ("a.json", '[\n{"a": 1},\n{"a": }\n]', ":3: not JSON: Expecting value"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}]', ":3: not JSON: ',' or ']' is needed"),
        ("a.json", '[\n{"a": 1},\n', ":3: not JSON: Expecting value"),
        ("a.json", '[{"a": 1}]\n[]', ":2: not JSON: there is text after the list"),
        ("a.json", '"a"', ":1: not JSON: a list of objects, [{…}, …], is needed"),
        ("a.json", '[{"a": 1},\n 2]', ":2: 2 (int), where an object is needed"),
        ("a.json", '{\n "a": [1]\n}', ":1: not JSON"),
        ("a.parquet", "no", ": not a Parquet file, or damaged or cut"),
        ("a.jsonl", "\x00", ": byte 0 is NUL"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    found = error(tmp_path / name, content)
    assert found.startswith(message), found


def test_values_of_the_wrong_type_are_named() -> None:
    record = Record({"text": "x", "n": 5, "label": None}, "f.jsonl:7")
    assert record.text("text", "text_column") == "x"
    for column, message in {
        "txt": "f.jsonl:7: there is no column txt; did you mean text?; there are text, n, label; name another with "
        "data.text_column=…",
        "n": "f.jsonl:7: n is 5 (int), where a text is needed",
        "label": "f.jsonl:7: label is None (NoneType), where a text is needed",
    }.items():
        with pytest.raises(ValueError, match=r".") as caught:
            record.text(column, "data.text_column")
        assert str(caught.value) == message


def test_record_files_are_found_in_folders_and_by_pattern(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl.gz", "c.txt", "sub/d.parquet", "e.json.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_records(str(tmp_path), "data.path")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jsonl.gz", "b.csv", "e.json.zst", "sub/d.parquet"]
    with pytest.raises(ValueError, match=r"data.validation_path=nowhere: no such file"):
        find_records("nowhere", "data.validation_path")
    with pytest.raises(ValueError, match=r"c.txt: of an unknown format; the known ones are .csv, .tsv"):
        find_records(str(tmp_path / "c.txt"), "data.path")


# --- quotes in TSV -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected", "stray"),
    [
        (['"Hi there\tham', "bye\tspam", 'so"\tham'], [('"Hi there', "ham"), ("bye", "spam"), ('so"', "ham")], 1),
        (['"A" and "B"\tham', '"\tspam'], [('"A" and "B"', "ham"), ('"', "spam")], 2),
        (
            ['"one\ttab"\tham', '"two', 'lines"\tspam', "x\ty"],
            [("one\ttab", "ham"), ("two\nlines", "spam"), ("x", "y")],
            0,
        ),
        (['"say ""hi"""\tham', 'ham\t"open', 'spam\t"x"'], [('say "hi"', "ham"), ("ham", '"open'), ("spam", "x")], 1),
        (['ham\t"two', 'lines"', "", "spam\tx\r"], [("ham", "two\nlines"), ("spam", "x")], 0),
    ],
)
def test_a_quote_that_nothing_closes_swallows_no_row(
    tmp_path: Path, lines: list[str], expected: list[tuple[str, str]], stray: int
) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(["text\tlabel", *lines]), newline="")
    reader = RecordReader()
    assert [tuple(record.values.values()) for record in reader.read(path)] == expected
    assert reader.stray_quotes == stray
    assert any("double quote that nothing closes" in note for note in reader.notes()) == (stray > 0)


def test_rows_of_a_wrong_number_of_fields_are_refused(tmp_path: Path) -> None:
    assert error(tmp_path / "a.tsv", 'a\tb\n1\t2\n"1\n').startswith(":3: 1 fields, and 2 columns; a field with a tab")


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("a.jsonl.zst", [b'{"text": "', b'"}'], ":1: the line has more than 33,554,432 characters"),
        ("a.csv.zst", [b'text\n"', b'"\n'], ":2: the line has more than 33,554,432 characters"),
        ("a.tsv.zst", [b"text\n", b"\n"], ":2: the line has more than"),
        ("a.json.zst", [b'[{"text": "', b'"}]'], ":1: not JSON: Unterminated string"),
    ],
)
def test_a_record_that_fills_the_memory_is_refused(tmp_path: Path, name: str, parts: list[bytes], message: str) -> None:
    path = tmp_path / name
    compressor = zstandard.ZstdCompressor().compressobj()
    letters = [b"a" * (1 << 20)] * 200
    path.write_bytes(b"".join(map(compressor.compress, [parts[0], *letters, parts[1]])) + compressor.flush())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r".") as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 250 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).removeprefix(f"{path}").startswith(message)


def test_a_row_of_csv_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_RECORD", 10_000)
    message = error(tmp_path / "a.csv", "text\n" + '"\n",' * 10_000)
    assert "the row that ends here or later (is a double quote not closed?) has more than 10,000 characters" in message


def test_a_cell_of_parquet_that_fills_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [{"text": "a"}] * 5 + [{"text": "".join(map(chr, range(300))) * 100}])
    monkeypatch.setattr(records, "LONGEST_RECORD", 20_000)
    with pytest.raises(ValueError, match=r"a\.parquet: column text in rows 1 to 6: a cell has more than 20,000 bytes"):
        read(path)
    monkeypatch.undo()
    bomb = write(tmp_path / "b.parquet", [{"text": "a" * (1 << 26)}])
    with pytest.raises(ValueError, match=r"b\.parquet: column text: a cell has more than 33,554,432 bytes"):
        read(bomb)
