"""Entries of the data cache: folders that are whole or absent, made once, and made again where they are damaged.

An entry is written into a temporary folder, synced and renamed.  A lock that dies with its process makes a second
process wait for the first instead of doing the same work.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.base.files import fsync
from llmtrain.base.leftovers import will_make
from llmtrain.base.locks import locked
from llmtrain.data.cache.token_reader import DataError

T = TypeVar("T")
log = logging.getLogger(__name__)
TEMPORARY = ".tmp-"
TEMPORARY_NAME = re.compile(r"\.tmp-([0-9a-f]{32})(-\d+)?")
WAITING = "waiting for another process, which is writing %s"


def find_or_make(
    cache_dir: Path,
    key: list[Any],
    open_entry: Callable[[Path, bool], T],
    fill: Callable[[Path], None],
    name: str,
    *,
    verify: bool = False,
) -> T:
    """Open the entry for ``key``, JSON-ready values, with ``open_entry(folder, verify)``; make it first if need be.

    ``fill`` writes the files of an entry into a folder that is invisible until it is whole; ``open_entry`` raises
    ValueError for a damaged entry.  With ``verify`` a damaged entry stays as it is.  Raises ValueError if the cache
    cannot be written or ``verify`` finds damage, and whatever ``fill`` raises; ``name``: the entry in messages.
    """
    folder = cache_dir / name_of(key)
    if folder.exists():
        try:
            return open_entry(folder, verify)
        except ValueError as error:
            if verify:
                raise ValueError(f"{error}; remove {folder}, and the next start tokenises the text again") from error
    try:
        will_make(folder, folder.with_suffix(".lock"))
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), lambda: log.info(WAITING, folder)) as is_locked:
            if folder.exists():  # damaged, unless another process made it while this one waited
                try:
                    return open_entry(folder, False)
                except ValueError as error:
                    log.warning("data cache: %s; the text is tokenised again", error)
            _sweep(cache_dir)
            _make(folder, _temporary(folder, is_shared=not is_locked), fill, name)
            return open_entry(folder, False)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache_dir}: {error.strerror}; name a writable place with room: data.cache_dir=DIR"
        ) from error


def name_of(key: list[Any]) -> str:
    """The name of the entry for ``key``."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _make(folder: Path, temporary: Path, fill: Callable[[Path], None], name: str) -> None:
    log.info("tokenising %s into %s", name, folder)
    _remove(temporary)  # left by a writer that died
    temporary.mkdir()
    try:
        fill(temporary)
        fsync(temporary)
        _remove(folder)  # the damaged one
        temporary.rename(folder)
        fsync(folder.parent)
    except DataError as error:
        raise DataError(f"tokenising {name}: {error}") from error
    finally:
        _remove(temporary)


def _temporary(folder: Path, *, is_shared: bool) -> Path:
    """The folder to write an entry into; where there are no locks (``is_shared``), one of this process's own."""
    return folder.with_name(f"{TEMPORARY}{folder.name}" + (f"-{os.getpid()}" if is_shared else ""))


class _BusyError(Exception):
    """Another process holds the lock."""


def _sweep(cache_dir: Path) -> None:
    """Remove the temporary folders of writers that died: those whose lock is free."""

    def busy() -> None:
        raise _BusyError

    for temporary in cache_dir.glob(f"{TEMPORARY}*"):
        if name := TEMPORARY_NAME.fullmatch(temporary.name):  # others are no folders of this program
            folder = temporary.with_name(name[1])
            with contextlib.suppress(_BusyError), locked(folder.with_suffix(".lock"), busy) as is_locked:
                if is_locked:
                    _remove(temporary)


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a link, but not what that leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
