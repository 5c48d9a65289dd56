"""Read records with named values from CSV, TSV, JSONL, JSON and Parquet, each with its origin, in bounded memory."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.base.checks import did_you_mean
from llmtrain.data.sources.documents import COMPRESSIONS, read_text
from llmtrain.data.sources.json_list import json_reason, read_json_list
from llmtrain.data.sources.parquet import read_parquet
from llmtrain.data.sources.search import LeftOut, find_files
from llmtrain.data.sources.tsv import TsvRows

LONGEST_RECORD = 1 << 25  # characters of a record: it is in memory as a whole, in several copies


SURROGATE = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """Values by the names of their columns."""

    values: Mapping[str, Any]
    origin: str  # file and line, for messages; file and row, from 1 on, for Parquet

    def text(self, column: str, key: str) -> str:
        """The text in ``column``, the value of the setting ``key``.  Raises ValueError if there is none."""
        value = self.value(column, key)
        if not isinstance(value, str):
            raise ValueError(f"{self.origin}: {column} is {shown(value)}, where a text is needed")
        if not value.isascii() and SURROGATE.search(value):
            raise ValueError(
                f"{self.origin}: {column} has half of a surrogate pair (\\ud800 to \\udfff), which is no character; "
                "correct the text, or remove it"
            )
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
    whole = repr(value[:40] if isinstance(value, str | list | tuple) else value)
    short = whole if len(whole) <= 40 else f"{whole[:39]}…"
    return f"{short} ({type(value).__name__})"


class RecordReader:
    """Reader of records.

    ``blank`` counts the empty lines that were skipped, ``stray_quotes`` the rows of TSV with a double quote that opens
    a field and that nothing closes, which is taken as text.
    """

    def __init__(self) -> None:
        self.blank = 0
        self.stray_quotes = 0

    def read(self, path: Path) -> Iterator[Record]:
        """Yield the records of ``path``, in the format of its suffix.

        All files are streamed.  Raises ValueError, naming file and line, for unreadable or malformed content, and for a
        record of more than ``LONGEST_RECORD`` characters.
        """
        yield from FORMATS[record_suffix(path)](self, path)

    def notes(self) -> list[str]:
        """Messages for the user about what was skipped, or read in a way that may not be meant."""
        notes = []
        if self.blank:
            notes.append(f"{self.blank:,} empty line{'s were' if self.blank != 1 else ' was'} skipped")
        if self.stray_quotes:
            rows = "row of a .tsv file has" if self.stray_quotes == 1 else "rows of .tsv files have"
            notes.append(
                f"{self.stray_quotes:,} {rows} a double quote that nothing closes: it was taken as text, and the row "
                "ends with its line"
            )
        return notes

    def _csv(self, path: Path) -> Iterator[Record]:
        """CSV as in RFC 4180; the first line names the columns."""
        csv.field_size_limit(LONGEST_RECORD)
        lines = _RowLines(path)
        rows = csv.reader(lines, strict=True)
        begin, columns = 1, None
        try:
            for row in rows:
                here, begin = begin, rows.line_num + 1
                lines.row_size = 0
                if not row:
                    self.blank += 1
                elif columns is None:
                    columns = _check_columns(row, f"{path}:{here}")
                elif len(row) != len(columns):
                    raise ValueError(
                        f"{path}:{here}: {len(row)} fields, and {len(columns)} columns ({', '.join(columns)}); a field "
                        "with ',' or a line break in it stands in double quotes"
                    )
                else:
                    yield Record(dict(zip(columns, row, strict=True)), f"{path}:{here}")
        except csv.Error as error:
            raise ValueError(
                f"{path}:{begin}: not CSV as in RFC 4180: {error}; a double quote in a quoted field is written twice"
            ) from error

    def _tsv(self, path: Path) -> Iterator[Record]:
        rows, columns = TsvRows(_lines(path), str(path), LONGEST_RECORD), None
        for line, row in rows:
            if not row:
                self.blank += 1
            elif columns is None:
                columns = _check_columns(row, f"{path}:{line}")
                rows.fields = len(columns)
            else:
                yield Record(dict(zip(columns, row, strict=True)), f"{path}:{line}")
        self.stray_quotes += rows.stray_quotes

    def _jsonl(self, path: Path) -> Iterator[Record]:
        """JSON Lines: one object per line."""
        for number, line in enumerate(_lines(path), 1):
            if line.isspace():
                self.blank += 1
                continue
            origin = f"{path}:{number}"
            try:
                value = json.loads(line.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{origin}: not JSON: {json_reason(error)}; a line has to hold one whole object"
                ) from error
            yield _check_object(value, origin)

    def _json(self, path: Path) -> Iterator[Record]:
        """A list of objects; also one object per line, which many files with this suffix hold."""
        if next((block.lstrip()[0] for block in read_text(path) if block.strip()), "") == "{":
            yield from self._jsonl(path)
            return
        for line, value in read_json_list(read_text(path), str(path), LONGEST_RECORD):
            yield _check_object(value, f"{path}:{line}")

    def _parquet(self, path: Path) -> Iterator[Record]:
        for number, row in enumerate(read_parquet(path, LONGEST_RECORD), 1):
            yield Record(row, f"{path}: row {number}")


FORMATS: dict[str, Callable[[RecordReader, Path], Iterator[Record]]] = {
    ".csv": RecordReader._csv,
    ".tsv": RecordReader._tsv,
    ".jsonl": RecordReader._jsonl,
    ".ndjson": RecordReader._jsonl,
    ".json": RecordReader._json,
    ".parquet": RecordReader._parquet,
}


def find_records(path: str, key: str, left_out: LeftOut | None = None) -> list[Path]:
    """The files that ``path``, the value of the setting ``key``, names; ``left_out`` counts the others of a folder.

    Raises ValueError if there is none.
    """
    wanted = f"file of records ({', '.join(FORMATS)})"
    files = find_files(path, lambda file: record_suffix(file) in FORMATS, wanted, key, left_out)
    for file in files:
        if record_suffix(file) not in FORMATS:
            raise ValueError(f"{file}: of an unknown format; the known ones are {', '.join(FORMATS)}, all but the last "
                             f"also with {' or '.join(COMPRESSIONS)} appended")  # fmt: skip
    return files


def count_stray_quotes(path: Path) -> int:
    """The rows of a TSV file with a double quote that opens a field and that nothing closes."""
    reader = RecordReader()
    for _ in reader.read(path):
        pass
    return reader.stray_quotes


def record_suffix(path: Path) -> str:
    """The suffix that names the format of ``path``, without that of a compression."""
    name = Path(path.stem) if path.suffix in COMPRESSIONS else path
    return "" if name.suffix == ".parquet" and name != path else name.suffix


def _lines(path: Path) -> Iterator[str]:
    """Yield lines with their ends; only a line feed ends one, as in JSONL and in a quoted field of CSV.

    Raises ValueError for a line of more than ``LONGEST_RECORD`` characters.
    """
    rest: list[str] = []
    size, number = 0, 1
    for block in read_text(path):
        *lines, last = block.split("\n")
        if lines:
            lines[0] = "".join(rest) + lines[0]
            yield from (f"{line}\n" for line in lines)
            number += len(lines)
            rest, size = [], 0
        rest.append(last)
        size += len(last)
        if size > LONGEST_RECORD:
            raise too_long(f"{path}:{number}", "the line")
    if size:
        yield "".join(rest)


def too_long(origin: str, what: str) -> ValueError:
    """The error for a record that is too long to be held in memory."""
    return ValueError(
        f"{origin}: {what} has more than {LONGEST_RECORD:,} characters, the most that a record may have; split it, or "
        "save a text of this length as a .txt file, which may be of any size"
    )


class _RowLines:
    """The lines of a CSV file, counted so that a row cannot take up the whole file."""

    def __init__(self, path: Path) -> None:
        self.path, self.row_size, self.number = path, 0, 0
        self._lines = _lines(path)

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.number += 1
            self.row_size += len(line)
            if self.row_size > LONGEST_RECORD:
                raise too_long(
                    f"{self.path}:{self.number}", "the row that ends here or later (is a double quote not closed?)"
                )
            yield line


def _check_columns(names: list[str], origin: str) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{origin}: the column {name!r} occurs twice; the first line has to name the columns")
    return names


def _check_object(value: Any, origin: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: {shown(value)}, where an object is needed: names in braces, with their values")
    return Record(value, origin)
