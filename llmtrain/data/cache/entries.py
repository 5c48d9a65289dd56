"""Entries of the data cache: folders that are whole or absent, made once, and made again where they are damaged.

An entry is written into a temporary folder, synced and renamed.  A lock that dies with its process makes a second
process wait for the first instead of doing the same work.
"""

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.base.files import fsync
from llmtrain.data.cache.token_reader import DataError

T = TypeVar("T")
log = logging.getLogger(__name__)
TEMPORARY = ".tmp-"


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
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if folder.exists():  # damaged, unless another process made it while this one waited
                try:
                    return open_entry(folder, False)
                except ValueError as error:
                    log.warning("data cache: %s; the text is tokenised again", error)
            _sweep(cache_dir)
            _make(folder, fill, name)
            return open_entry(folder, False)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache_dir}: {error.strerror}; name a writable place with room: data.cache_dir=DIR"
        ) from error


def name_of(key: list[Any]) -> str:
    """The name of the entry for ``key``."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _make(folder: Path, fill: Callable[[Path], None], name: str) -> None:
    log.info("tokenising %s into %s", name, folder)
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a writer that died
    temporary.mkdir()
    try:
        fill(temporary)
        fsync(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # the damaged one
        temporary.rename(folder)
        fsync(folder.parent)
    except DataError as error:
        raise DataError(f"tokenising {name}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    return folder.with_name(TEMPORARY + folder.name)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with folder.with_suffix(".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which is writing %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(cache_dir: Path) -> None:
    """Remove the temporary folders of writers that died: those whose lock is free."""
    for temporary in cache_dir.glob(f"{TEMPORARY}*/"):
        folder = temporary.with_name(temporary.name.removeprefix(TEMPORARY))
        with folder.with_suffix(".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(temporary, ignore_errors=True)
