"""Read records with named values from CSV, TSV, JSONL, JSON and Parquet, each with its origin."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.base.checks import did_you_mean, needing_package
from llmtrain.data.sources.documents import read_text
from llmtrain.data.sources.files import find_files

COMPRESSIONS = (".gz", ".zst")
BATCH_ROWS = 1024  # of a Parquet file, in memory at once
LONGEST_FIELD = 1 << 30  # characters; csv's own limit of 131,072 is for files of another kind


class Record(NamedTuple):
    """Values by the names of their columns."""

    values: Mapping[str, Any]
    origin: str  # file and line, for messages; file and row, from 1 on, for Parquet

    def text(self, column: str, key: str) -> str:
        """The text in ``column``, the value of the setting ``key``.  Raises ValueError if there is none."""
        value = self.value(column, key)
        if not isinstance(value, str):
            raise ValueError(f"{self.origin}: {column} is {shown(value)}, where a text is needed")
        return value

    def value(self, column: str, key: str) -> Any:
        """The value in ``column``.  Raises ValueError, listing the columns, if there is none of this name."""
        if column not in self.values:
            raise ValueError(
                f"{self.origin}: there is no column {column}{did_you_mean(column, self.values)}; there are "
                f"{', '.join(self.values) or 'none'}; name another with {key}=…"
            )
        return self.values[column]


def shown(value: Any) -> str:
    """A value of a wrong type, shortened for a message."""
    short = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:39]}…"
    return f"{short} ({type(value).__name__})"


class RecordReader:
    """Reader of records.

    ``blank`` counts the empty lines that were skipped.
    """

    def __init__(self) -> None:
        self.blank = 0

    def read(self, path: Path) -> Iterator[Record]:
        """Yield the records of ``path``, in the format of its suffix.

        Files are streamed, except JSON lists.  Raises ValueError, naming file and line, for unreadable or malformed
        content.
        """
        yield from FORMATS[_suffix(path)](self, path)

    def _csv(self, path: Path, delimiter: str = ",") -> Iterator[Record]:
        """CSV as in RFC 4180; the first line names the columns."""
        csv.field_size_limit(LONGEST_FIELD)
        rows = csv.reader(_lines(path), delimiter=delimiter, strict=True)
        begin, columns = 1, None
        try:
            for row in rows:
                here, begin = begin, rows.line_num + 1
                if not row:
                    self.blank += 1
                elif columns is None:
                    columns = _check_columns(row, f"{path}:{here}")
                elif len(row) != len(columns):
                    raise ValueError(
                        f"{path}:{here}: {len(row)} fields, and {len(columns)} columns ({', '.join(columns)}); a field "
                        f"with {delimiter!r} or a line break in it stands in double quotes"
                    )
                else:
                    yield Record(dict(zip(columns, row, strict=True)), f"{path}:{here}")
        except csv.Error as error:
            raise ValueError(
                f"{path}:{begin}: not CSV as in RFC 4180: {error}; a double quote in a quoted field is written twice"
            ) from error

    def _tsv(self, path: Path) -> Iterator[Record]:
        return self._csv(path, "\t")

    def _jsonl(self, path: Path) -> Iterator[Record]:
        """JSON Lines: one object per line."""
        for number, line in enumerate(_lines(path), 1):
            if line.isspace():
                self.blank += 1
                continue
            origin = f"{path}:{number}"
            try:
                value = json.loads(line.rstrip("\r\n"))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(
                    f"{origin}: not JSON: {_reason(error)}; a line has to hold one whole object"
                ) from error
            yield _check_object(value, origin)

    def _json(self, path: Path) -> Iterator[Record]:
        """A list of objects; also one object per line, which many files with this suffix hold."""
        text = "".join(read_text(path))
        if text.lstrip().startswith("{"):
            del text
            yield from self._jsonl(path)
            return
        decoder, space = json.JSONDecoder(), re.compile(r"\s*")
        at, line, counted = space.match(text).end(), 1, 0  # type: ignore[union-attr]
        try:
            if text[at : at + 1] != "[":
                raise json.JSONDecodeError("a list of objects, [{…}, …], is needed", text, at)
            at, is_first = space.match(text, at + 1).end(), True  # type: ignore[union-attr]
            while text[at : at + 1] != "]":
                if not is_first:
                    if text[at : at + 1] != ",":
                        raise json.JSONDecodeError("',' or ']' is needed", text, at)
                    at = space.match(text, at + 1).end()  # type: ignore[union-attr]
                value, end = decoder.raw_decode(text, at)
                line += text.count("\n", counted, at)
                counted = at
                yield _check_object(value, f"{path}:{line}")
                at, is_first = space.match(text, end).end(), False  # type: ignore[union-attr]
            if text[at + 1 :].strip():
                raise json.JSONDecodeError("there is text after the list", text, at + 1)
        except (json.JSONDecodeError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else at
            raise ValueError(f"{path}:{1 + text.count(chr(10), 0, at)}: not JSON: {_reason(error)}") from error

    def _parquet(self, path: Path) -> Iterator[Record]:
        with needing_package(f'{path}: needs pyarrow; pip install "llmtrain[parquet]"'):
            import pyarrow
            from pyarrow import parquet
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield Record(row, f"{path}: row {number}")
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a Parquet file, or damaged or cut: {error}") from error


FORMATS: dict[str, Callable[[RecordReader, Path], Iterator[Record]]] = {
    ".csv": RecordReader._csv,
    ".tsv": RecordReader._tsv,
    ".jsonl": RecordReader._jsonl,
    ".ndjson": RecordReader._jsonl,
    ".json": RecordReader._json,
    ".parquet": RecordReader._parquet,
}


def find_records(path: str, key: str) -> list[Path]:
    """The files that ``path``, the value of the setting ``key``, names.  Raises ValueError if there is none."""
    files = find_files(path, lambda file: _suffix(file) in FORMATS, f"file of records ({', '.join(FORMATS)})", key)
    for file in files:
        if _suffix(file) not in FORMATS:
            raise ValueError(f"{file}: of an unknown format; the known ones are {', '.join(FORMATS)}, all but the last "
                             f"also with {' or '.join(COMPRESSIONS)} appended")  # fmt: skip
    return files


def _suffix(path: Path) -> str:
    name = Path(path.stem) if path.suffix in COMPRESSIONS else path
    return "" if name.suffix == ".parquet" and name != path else name.suffix


def _lines(path: Path) -> Iterator[str]:
    """Yield lines with their ends; only a line feed ends one, as in JSONL and in a quoted field of CSV."""
    rest = ""
    for block in read_text(path):
        *lines, rest = (rest + block).split("\n") if "\n" in block else [rest + block]
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest


def _check_columns(names: list[str], origin: str) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{origin}: the column {name!r} occurs twice; the first line has to name the columns")
    return names


def _check_object(value: Any, origin: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: {shown(value)}, where an object is needed: names in braces, with their values")
    return Record(value, origin)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply"
