"""Find files, and remember facts about them that are slow to compute."""

import fcntl
import glob
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from llmtrain.base.checks import where
from llmtrain.base.files import write_atomically
from llmtrain.base.leftovers import will_make

log = logging.getLogger(__name__)
Fact = TypeVar("Fact", str, int, list)  # a JSON value
REPORT_SECONDS = 10


def find_files(path: str, is_wanted: Callable[[Path], bool], wanted: str, key: str = "data.path") -> list[Path]:
    """The files that ``path``, the value of the setting ``key``, names: a file, a folder or a glob of those.

    Sorted.  From a folder and its subfolders come the files that ``is_wanted`` accepts (``wanted``: the same in words),
    except hidden ones.  A file that is named or matched itself is always taken.  Raises ValueError if there is none.
    """
    literal = Path(path).expanduser()
    if literal.exists():
        found = [literal]
    elif glob.has_magic(path):
        found = [Path(name) for name in glob.glob(str(literal), recursive=True)]  # noqa: PTH207 - takes any path
        if not found:
            raise ValueError(f"{key}={path}: no file matches{where(path)}")
    else:
        raise ValueError(f"{key}={path}: no such file or folder{where(path)}")
    files: set[Path] = set()
    for each in found:
        files.update(filter(is_wanted, _walk(each)) if each.is_dir() else [each])
    if not files:
        raise ValueError(f"{key}={path}: there is no {wanted} in this folder")
    return sorted(files)


def _walk(folder: Path) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts)]


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
        with memo.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may have learnt something as well
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
