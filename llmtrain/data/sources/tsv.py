"""Rows of tab-separated values: a line is a row, whatever quotes are in it."""

import csv
from collections.abc import Iterator


class TsvRows:
    """The rows of ``lines``, each with the number of its line; an empty line is an empty row.

    Tab-separated files have no quoting by their definition (IANA, text/tab-separated-values), yet many programs quote
    as in CSV.  Both are read: a field that a double quote opens *and closes* is unquoted, and may hold tabs and line
    breaks.  Any other double quote is text: one that nothing closes does not swallow the rows after it.  Where a quoted
    field seems to run over a line that is a row itself, the quote is text.

    ``fields``: those that a row has; None until the first row has been read.
    """

    def __init__(self, lines: Iterator[str], name: str, longest: int) -> None:
        self.fields: int | None = None
        self.stray_quotes = 0  # rows with a quote that opens a field and that is text
        self._lines, self._name, self._longest = enumerate(lines, 1), name, longest
        self._ahead: list[tuple[int, str]] = []
        csv.field_size_limit(longest)

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        while (numbered := self._next()) is not None:
            number, line = numbered
            row = [] if not line else self._row(line)
            if row and self.fields is not None and len(row) != self.fields:
                raise ValueError(
                    f"{self._name}:{number}: {len(row)} fields, and {self.fields} columns; a field with a tab or a "
                    "line break in it stands in double quotes"
                )
            yield number, row

    def _row(self, line: str) -> list[str]:
        plain = line.split("\t")
        if not any(field.startswith('"') for field in plain):
            return plain
        if (quoted := _unquote(line)) is not None:
            return quoted if self.fields in (None, len(quoted)) else self._literal(plain)
        if (following := self._lines_of_field(line, is_row=len(plain) == self.fields)) is not None:
            return following
        return self._literal(plain)

    def _literal(self, plain: list[str]) -> list[str]:
        """The fields between tabs; those that are quoted in themselves are unquoted."""
        self.stray_quotes += 1
        return [field if (alone := _unquote(field)) is None or len(alone) != 1 else alone[0] for field in plain]

    def _lines_of_field(self, line: str, *, is_row: bool) -> list[str] | None:
        """The row of a field over several lines, the first of them ``line``; None if there is no such field."""
        lines, quotes, size = [line], line.count('"'), len(line)
        if quotes % 2 == 0:
            return None  # it is closed, and something else is wrong
        while size <= self._longest:
            following = self._look_ahead(len(lines) - 1)
            if following is None or (is_row and following.count("\t") + 1 == self.fields):
                return None
            lines.append(following)
            quotes, size = quotes + following.count('"'), size + len(following) + 1
            if quotes % 2 == 0:
                row = _unquote("\n".join(lines))
                if row is None or len(row) != self.fields:
                    return None
                del self._ahead[: len(lines) - 1]
                return row
        return None

    def _next(self) -> tuple[int, str] | None:
        if self._ahead:
            return self._ahead.pop(0)
        numbered = next(self._lines, None)
        return None if numbered is None else (numbered[0], numbered[1].rstrip("\r\n"))

    def _look_ahead(self, number: int) -> str | None:
        while len(self._ahead) <= number:
            if (following := next(self._lines, None)) is None:
                return None
            self._ahead.append((following[0], following[1].rstrip("\r\n")))
        return self._ahead[number][1]


def _unquote(text: str) -> list[str] | None:
    """The fields of one row, quoted as in CSV; None if ``text`` is not one whole row."""
    try:
        rows = list(csv.reader([f"{line}\n" for line in text.split("\n")], delimiter="\t", strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None
