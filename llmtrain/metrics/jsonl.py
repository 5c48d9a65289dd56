"""Rows in a file, one JSON object a line, readable while the run goes on.

JSON lacks numbers that are not finite, and dropping one would hide a failure: nan and the infinities are written as
the strings "nan", "inf" and "-inf", and :func:`read_metrics` turns them back into floats.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmtrain.base.files import write_atomically
from llmtrain.base.run_records import check_row, read_rows

Row = dict[str, Any]  # values are str, bool, int, float (also nan and infinite), None, or lists and dicts of these

_NON_FINITE = ("nan", "inf", "-inf")


def to_line(row: Row) -> str:
    """Format ``row`` as its line in the file, newline included."""
    return json.dumps(_encode(row), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def read_metrics(path: Path) -> list[Row]:
    """Read all rows of the file at ``path``, in the order in which they were written.

    A last line without its newline, as a kill or a running process leaves it, is not a row yet and is left out.
    Raises ValueError that names file and line if another line is not a row as a run writes it.
    """
    return [row for _, row in _lines(path)]


def drop_rows(path: Path, drop: Callable[[Row], bool]) -> None:
    """Remove the rows for which ``drop`` is true, and a torn last line, from the file at ``path``.

    The file is replaced as a whole: a kill leaves the old one or the new one.  A missing file stays missing.
    """
    if not path.exists():
        return
    text = "".join(line for line, row in _lines(path) if not drop(row))
    if len(text.encode("utf-8")) != path.stat().st_size:
        write_atomically(path, text)


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each whole line of the file with its row."""
    for number, (line, stored) in enumerate(read_rows(path), start=1):
        row = _decode(stored)
        check_row(row, f"{path}, line {number}")
        yield line, row


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    assert value not in _NON_FINITE, f"the string {value!r} would be read back as a number"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return float(value) if value in _NON_FINITE else value
