"""Files of a run, read as data that may come from elsewhere: regular files alone, of bounded size, checked by type.

A run directory travels.  A pipe, a device or a link to one in it would hang a reader or fill the memory, and a value of
another type would end a command far from the file that it came from.
"""

import dataclasses
import json
import os
import stat
from collections.abc import Callable, Mapping
from itertools import chain, islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

MAX_BYTES = 16 << 20  # of a file that is read whole; a run writes some kilobytes
MAX_DEPTH = 60  # of nested lists and objects; a run writes a handful
MAX_INTEGER = 1 << 63
MAX_ITEMS = 1 << 22  # of all lists and objects of one depth, references in YAML counted as often as they occur


class StoredFileError(ValueError):
    """A stored file that cannot be used; the message names it."""


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, without waiting for the other end of a pipe; returns its descriptor.

    Raises :class:`StoredFileError` for anything that is no regular file, and OSError.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise StoredFileError(f"{path}: {_kind_of(kind)}, where a file is needed; remove it, or restore the file")
    return descriptor


def _kind_of(mode: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def read_regular_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises :class:`StoredFileError` for anything else, and OSError.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise StoredFileError(f"{path}: longer than {limit:,} bytes, more than a run writes; restore it")
    return content


def read_text_file(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a regular file, UTF-8.  Raises as :func:`read_regular_file` does."""
    try:
        return read_regular_file(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise StoredFileError(f"{path}: byte {error.start} is not UTF-8; restore it") from error


def read_json_object(path: Path, what: str = "a JSON object") -> dict[str, Any]:
    """The JSON object in a regular file; ``what`` it is, for messages.  Raises as :func:`read_regular_file` does."""
    return parse_json_object(read_text_file(path), str(path), what)


def parse_json_object(text: str, where: str, what: str = "a JSON object") -> dict[str, Any]:
    """Parse a JSON object; ``where`` is its place and ``what`` its meaning in messages.

    Raises :class:`StoredFileError` for other JSON, a key that occurs twice, and deep nesting.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_duplicates)
        check_depth(values)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise StoredFileError(f"{where}: not JSON ({reason})") from error
    if not isinstance(values, dict):
        raise StoredFileError(f"{where}: not {what}")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return values


def check_depth(value: Any, depth: int = MAX_DEPTH) -> None:
    """Raise ValueError for lists and mappings nested deeper than ``depth``, that hold themselves, or far too many."""
    if not isinstance(value, list | Mapping):
        return
    level = [value]
    for _ in range(depth):
        parts = (each.values() if isinstance(each, Mapping) else each for each in level)
        inner = list(islice(chain.from_iterable(parts), MAX_ITEMS + 1))
        if len(inner) > MAX_ITEMS:
            raise ValueError("too many values")
        level = [item for item in inner if isinstance(item, list | Mapping)]
        if not level:
            return
    raise ValueError("nested too deeply")


# --- the types of values ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A type of values, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < MAX_INTEGER)


COUNT = Kind("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < MAX_INTEGER)
NUMBER = Kind("a number", _is_number)
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a text", lambda value: type(value) is str)
TEXTS = Kind("a list of texts", lambda value: type(value) is list and all(type(item) is str for item in value))
OBJECT = Kind("an object", lambda value: type(value) is dict)
LIST = Kind("a list", lambda value: type(value) is list)
OBJECTS = Kind("a list of objects", lambda value: type(value) is list and all(type(item) is dict for item in value))


def optional(kind: Kind) -> Kind:
    """``kind`` or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Raise :class:`StoredFileError`, naming the place and the key, for a value of another kind; missing keys pass."""
    for key, kind in kinds.items():
        if key in values and not kind.holds(values[key]):
            refuse(where, f"{key}={_short(values[key])}: must be {kind.words}")


def refuse(where: str, reason: str) -> NoReturn:
    """Raise :class:`StoredFileError` about a place."""
    raise StoredFileError(f"{where}: {reason}; the file was edited or damaged, restore it")


def _short(value: Any) -> str:
    if type(value) is int and abs(value) >= MAX_INTEGER:
        return "a huge number"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"


T = TypeVar("T")
_KINDS = {int: Kind("a whole number", lambda value: type(value) is int and abs(value) < MAX_INTEGER), float: NUMBER,
          bool: FLAG, str: TEXT, list: LIST, dict: OBJECT, list[str]: TEXTS}  # fmt: skip


def build_typed(cls: type[T], values: Any, where: str) -> T:
    """Build a dataclass of plain fields from a stored object.

    Raises :class:`StoredFileError`, naming the place and the key, for unknown and missing keys and other types.
    """
    if not isinstance(values, Mapping):
        refuse(where, "must be an object")
    members = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in members:
            refuse(where, f"{key}: no such key here")
    for name, field in members.items():
        if name not in values and field.default is field.default_factory:  # both missing
            refuse(where, f"has no {name}")
    hints = get_type_hints(cls)
    check_kinds(values, {name: _kind_of_hint(hints[name]) for name in members}, where)
    return cls(**values)


def _kind_of_hint(hint: Any) -> Kind:
    if isinstance(hint, UnionType):
        (kind,) = (each for each in get_args(hint) if each is not NoneType)
        return optional(_kind_of_hint(kind))
    return _KINDS[hint] if hint in _KINDS else _KINDS[get_origin(hint)]
