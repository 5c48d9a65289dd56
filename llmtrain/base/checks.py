"""Checks of configured values: one form of message, ``key=value: what is wrong; what would work``.

Comparisons are written so that NaN fails them.  ``None``, a value that the user left out, passes.
"""

import difflib
import glob
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmtrain.base.format import visible


def positive(**values: float | None) -> None:
    """Raise ValueError unless every value is positive and finite."""
    for key, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{key}={value}: must be positive")


def non_negative(**values: float | None) -> None:
    """Raise ValueError unless every value is zero or positive, and finite."""
    for key, value in values.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{key}={value}: must not be negative")


def fraction(**values: float | None) -> None:
    """Raise ValueError unless every value lies in [0, 1]."""
    for key, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{key}={value}: must lie between 0 and 1")


def pattern(key: str, value: str) -> None:
    """Raise ValueError unless ``value`` is a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{key}={value!r}: not a regular expression ({error})") from error


def pattern_matches(key: str, value: str, names: Iterable[str]) -> None:
    """Raise ValueError, with the nearest of ``names``, unless ``re.search`` finds ``value`` in one of them."""
    names = list(names)
    if not any(re.search(value, name) for name in names):
        raise ValueError(f"{key}={value!r}: matches no parameter; the nearest are {', '.join(_nearest(value, names))}")


def unicode_text(**values: str | None) -> None:
    """Raise ValueError unless every value is text that UTF-8 can write: bytes in another encoding are none."""
    for key, value in values.items():
        if value is not None and not is_unicode(value):
            raise ValueError(f"{key}={visible(value)}: holds bytes that are not UTF-8; type or convert it in UTF-8")


def is_unicode(text: str) -> bool:
    """Return whether ``text`` is without lone surrogates, which stand for bytes that could not be decoded."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def did_you_mean(value: str, names: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return the end of a message about an unknown name: the nearest of ``names``, or nothing."""
    nearest = difflib.get_close_matches(value.lower(), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def where(path: str) -> str:
    """Return the end of a message about a missing file: the working directory, if ``path`` is relative."""
    return "" if Path(path).expanduser().is_absolute() else f" in {Path.cwd()}"


def check_input(key: str, path: str) -> None:
    """Raise ValueError, naming the setting ``key``, if ``path`` is not there; but for a .txt it may be a pattern."""
    is_text, file = Path(path).suffix == ".txt", Path(path).expanduser()
    if is_text and file.is_dir():
        raise ValueError(f"{key}={path}: a folder; name a file")
    if not file.exists() and (is_text or not glob.has_magic(path)):
        raise ValueError(f"{key}={path}: no such file{'' if is_text else ' or folder'}{where(path)}")


@contextmanager
def needing_package(message: str) -> Iterator[None]:
    """Raise ValueError with ``message`` where an import within finds no module."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(message) from error


def _nearest(value: str, names: Sequence[str]) -> list[str]:
    """List the names most like ``value``, in full or in one dotted part; one name stands for that of all layers."""

    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, value, part).ratio() for part in (name, *name.split(".")))

    distinct = {re.sub(r"\d+", "*", name): name for name in reversed(names)}
    return sorted(distinct.values(), key=likeness, reverse=True)[:3]
