"""Facts about files that are slow to compute, remembered until the files change."""

import hashlib
import json
import logging
import stat as file_modes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from llmtrain.base.files import write_atomically
from llmtrain.base.leftovers import will_make
from llmtrain.base.locks import locked

log = logging.getLogger(__name__)
Fact = TypeVar("Fact", str, int, list)  # a JSON value
REPORT_SECONDS = 10


Stamp = tuple[int, int]


def stamp(path: Path) -> Stamp:
    """Size and modification time (ns) of a file, to notice changes.  Raises ValueError if it is not readable."""
    return _moment(path)[:2]


Moment = tuple[int, int, int]


def _moment(path: Path) -> Moment:
    """Stamp and time of the last change of the inode (ns), which no program can set back."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def remember(memo: Path, files: Sequence[Path], learn: Callable[[Path], Fact], *, verify: bool = False) -> list[Fact]:
    """``learn(file)`` for every file, or the fact in the JSON file ``memo`` if the file has not changed since.

    With ``verify`` everything is learnt again.  Then raises ValueError for a file that gives another fact although its
    size and modification time are the same: its bytes have changed by themselves.
    """
    known = read_memo(memo)
    learnt: dict[str, list] = {}
    facts = []
    reported = time.monotonic()
    try:
        for number, file in enumerate(files):
            name, now = str(file.resolve()), _moment(file)
            before, fact = known.get(name, [None, None])
            if verify or before != list(now):
                new = learn(file)
                if before is not None and before[:2] == list(now[:2]) and new != fact:
                    changed = f"{file}: its content has changed, its size and modification time have not"
                    if verify:
                        raise ValueError(f"{changed}; restore it from a copy (or, if the change is meant, touch it)")
                    log.warning("%s", changed)
                fact = new
                known[name] = learnt[name] = [list(now), fact]
            facts.append(fact)
            if time.monotonic() - reported > REPORT_SECONDS:
                log.info("checking data: %d of %d files", number + 1, len(files))
                reported = time.monotonic()
    finally:  # keeps what was learnt before an interrupt
        if learnt:
            _add_to_memo(memo, learnt)
    return facts


def read_memo(memo: Path) -> dict[str, list]:
    """Read the remembered facts, ``[moment, fact]`` by path; {} if the memo is missing or damaged."""
    try:
        if not file_modes.S_ISREG(memo.stat().st_mode):
            return {}
        stored = json.loads(memo.read_text(encoding="utf-8"))
        files = stored["files"]
        return files if stored["sha256"] == _digest(files) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_memo(memo: Path, files: dict[str, list]) -> None:
    write_atomically(memo, json.dumps({"sha256": _digest(files), "files": files}))


def _digest(files: dict[str, list]) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _add_to_memo(memo: Path, learnt: dict[str, list]) -> None:
    try:
        will_make(memo, memo.with_suffix(".lock"))
        memo.parent.mkdir(parents=True, exist_ok=True)
        with locked(memo.with_suffix(".lock")):  # another process may have learnt something as well
            write_memo(memo, read_memo(memo) | learnt)
    except OSError as error:
        log.warning("%s: %s; it will be computed again next time", memo, error.strerror)


def sha256(path: Path) -> str:
    """sha256 of a file's content.  Raises ValueError if it is not readable."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
