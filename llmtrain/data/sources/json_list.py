"""Read a JSON list of objects, one at a time: the list is never whole in memory."""

import json
import re
from collections.abc import Iterator
from typing import Any

SPACE = re.compile(r"[ \t\r\n]*")


def read_json_list(blocks: Iterator[str], name: str, longest: int) -> Iterator[tuple[int, Any]]:
    """Yield each element of the list in ``blocks`` with the line that it begins in.

    Raises ValueError, naming the line, for text that is no list, and for an element of more than ``longest``
    characters.
    """
    text = _Text(blocks, name, longest)
    if text.peek() != "[":
        raise text.error("a list of objects, [{…}, …], is needed")
    text.skip(1)
    is_first = True
    while text.peek() != "]":
        if not is_first:
            if text.peek() != ",":
                raise text.error("',' or ']' is needed")
            text.skip(1)
            text.peek()
        line = text.line
        yield line, text.value()
        is_first = False
    text.skip(1)
    if text.peek():
        raise text.error("there is text after the list")


class _Text:
    """Text from blocks, read from the left; what has been read is forgotten."""

    def __init__(self, blocks: Iterator[str], name: str, longest: int) -> None:
        self.line = 1
        self._blocks, self._name, self._longest = blocks, name, longest
        self._rest, self._at, self._ended = "", 0, False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Skip white space; the next character, "" at the end."""
        while True:
            end = SPACE.match(self._rest, self._at).end()  # type: ignore[union-attr]
            self.skip(end - self._at)
            if self._at < len(self._rest):
                return self._rest[self._at]
            if not self._read(1):
                return ""

    def skip(self, number: int) -> None:
        self.line += self._rest.count("\n", self._at, self._at + number)
        self._at += number

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._rest, self._at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._read(max(len(self._rest) - self._at, 1)):
                    raise self._explain(error) from error
                continue
            if end == len(self._rest) and self._read(1):
                continue  # a number may go on
            self.skip(end - self._at)
            return value

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self._name}:{self.line}: not JSON: {what}")

    def _explain(self, error: Exception) -> ValueError:
        if isinstance(error, json.JSONDecodeError):
            self.skip(max(error.pos - self._at, 0))
        if not self._ended and not isinstance(error, RecursionError):
            return self.error(
                f"{json_reason(error)}; or an element of more than {self._longest:,} characters, the most"
            )
        return self.error(json_reason(error))

    def _read(self, number: int) -> bool:
        """Read at least ``number`` characters more; False if there are none, or too many are held already."""
        if self._ended or len(self._rest) - self._at > self._longest:
            return False
        parts, size = [self._rest[self._at :]], 0
        while size < number:
            block = next(self._blocks, None)
            if block is None:
                self._ended = True
                break
            parts.append(block)
            size += len(block)
        if size:
            self._rest, self._at = "".join(parts), 0
        return size > 0


def json_reason(error: Exception) -> str:
    """The reason of an error of the json module, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
