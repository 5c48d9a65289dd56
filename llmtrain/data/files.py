"""Finding files, and remembering what was slow to learn about them."""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
Fact = TypeVar("Fact", str, int)


def find_files(path: str, is_wanted: Callable[[Path], bool], wanted: str) -> list[Path]:
    """The files that ``path`` names: a file, a folder (with its subfolders) or a glob of those; sorted.

    Of a folder the files that ``is_wanted``, in words ``wanted``; hidden ones are passed over.  A file that is named
    itself, or matched, is always taken.  Raises ValueError where there is none.
    """
    literal = Path(path).expanduser()
    if literal.exists():
        found = [literal]
    elif glob.has_magic(path):
        found = [Path(name) for name in glob.glob(str(literal), recursive=True)]  # noqa: PTH207 - takes any path
        if not found:
            raise ValueError(f"data.path={path}: no file matches")
    else:
        raise ValueError(f"data.path={path}: no such file or folder")
    files: set[Path] = set()
    for each in found:
        files.update(filter(is_wanted, _walk(each)) if each.is_dir() else [each])
    if not files:
        raise ValueError(f"data.path={path}: there is no {wanted} in this folder")
    return sorted(files)


def _walk(folder: Path) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts)]


Stamp = tuple[int, int]


def stamp(path: Path) -> Stamp:
    """Size and modification time (ns): whether a file is still the same.  Raises ValueError if it is not readable."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def remember(memo: Path, files: Sequence[Path], learn: Callable[[Path], Fact]) -> list[Fact]:
    """``learn(file)`` of every file, from the JSON file ``memo`` where the file has not changed since.

    Processes that write the memo at the same time can lose each other's facts, which are then learnt again.
    """
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}  # none yet, or damaged: everything is learnt again
    facts, changed = [], False
    for file in files:
        name, now = str(file.resolve()), stamp(file)
        if name not in known or known[name][0] != list(now):
            known[name] = [list(now), learn(file)]
            changed = True
        facts.append(known[name][1])
    if changed:
        temporary = memo.with_name(f".tmp-{memo.name}-{os.getpid()}")
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(known), encoding="utf-8")
            temporary.replace(memo)
        except OSError as error:
            log.warning("%s: %s; it will be computed again next time", memo, error.strerror)
    return facts


def sha256(path: Path) -> str:
    """sha256 of a file's content.  Raises ValueError if it is not readable."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
