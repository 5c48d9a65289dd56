"""Find the files that a setting names, and account for those that are left out."""

import contextlib
import glob
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.base.checks import where
from llmtrain.base.format import size as bytes_shown
from llmtrain.data.sources.documents import BINARY, COMPRESSIONS

NAMES = 3  # of the files left out for one reason, that a message shows
ENDINGS = 6

HIDDEN = "hidden"
OTHER_ENDING = "of another ending"
EMPTY = "empty"
NO_FILE = "no regular file (a pipe, a device, or a link to nothing)"
UNREADABLE = "a folder that cannot be read"
CYCLE = "a link to a file or folder that is read already"
NO_ROW = "without a row"
NO_TEXT = (HIDDEN, EMPTY, CYCLE, NO_ROW, BINARY)  # the reasons that leave out nothing like text


@dataclass
class Reason:
    """The files that are left out for one reason."""

    files: int = 0
    bytes: int = 0
    names: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)


@dataclass
class LeftOut:
    """The files of a folder that are not read, by the reason; for messages to the user."""

    key: str = "data.path"  # the setting that names the folder
    path: str = ""  # the folder, as the user named it
    reasons: dict[str, Reason] = field(default_factory=dict)
    named: set[Path] = field(default_factory=set)  # files that the user named or matched themselves: never left out

    def add(self, reason: str, file: Path, folder: Path | None = None) -> None:
        """Count ``file``, found below ``folder``."""
        folder = folder or Path(self.path).expanduser()
        found = self.reasons.setdefault(reason, Reason())
        found.files += 1
        with contextlib.suppress(OSError):  # its size is unknown
            found.bytes += file.stat().st_size if file.is_file() else 0
        found.endings["".join(file.suffixes[-2:]) if file.suffix in COMPRESSIONS else file.suffix] += 1
        if len(found.names) < NAMES:
            found.names.append(str(file.relative_to(folder) if file.is_relative_to(folder) else file))

    def notes(self, *, like_text: bool | None = None) -> list[str]:
        """A message for each reason: number and size of the files, their endings, the first names.

        ``like_text``: of the reasons alone that leave out what may be text, or of the others.
        """
        return [
            f"{self.key}={self.path}: left out, {reason}: {found.files:,} ({bytes_shown(found.bytes)}"
            f"{_endings(found.endings)}): {', '.join(found.names)}{', …' if found.files > len(found.names) else ''}"
            for reason, found in self.reasons.items()
            if like_text in (None, reason not in NO_TEXT)
        ]

    def brief(self) -> str:
        """All of it in a short line; "" if nothing is left out."""
        counts = "; ".join(f"{found.files:,} {reason}" for reason, found in self.reasons.items())
        return f"{self.key}={self.path}: left out: {counts}" if counts else ""


def _endings(endings: Counter[str]) -> str:
    shown = [f"{number:,} {ending or 'without ending'}" for ending, number in endings.most_common(ENDINGS)]
    return f"; {', '.join(shown)}{', …' if len(endings) > ENDINGS else ''}" if len(endings) > 1 else ""


def find_files(
    path: str,
    is_wanted: Callable[[Path], bool],
    wanted: str,
    key: str = "data.path",
    left_out: LeftOut | None = None,
    *,
    follows_links: bool = True,
) -> list[Path]:
    """The files that ``path``, the value of the setting ``key``, names: a file, a folder or a glob of those.

    Sorted.  From a folder and its subfolders, linked ones too with ``follows_links``, come the files that ``is_wanted``
    accepts (``wanted``: the same in words), except hidden ones; ``left_out`` counts the others.  A file that is named
    or matched itself is always taken.  Raises ValueError if there is none, or for
    a name that is no regular file.
    """
    literal = Path(path).expanduser()
    left_out = LeftOut() if left_out is None else left_out
    left_out.key, left_out.path = key, path
    if literal.exists():
        found = [literal]
    elif glob.has_magic(path):
        found = _matches(literal)
        if not found:
            raise ValueError(f"{key}={path}: no file matches{where(path)}")
    else:
        raise ValueError(f"{key}={path}: no such file or folder{where(path)}")
    files: set[Path] = set()
    for each in found:
        if each.is_dir():
            files.update(_files_of(each, is_wanted, left_out, follows_links=follows_links))
        elif not each.is_file():
            raise ValueError(
                f"{key}={each}: not a regular file (a pipe, a device, or a link to nothing); save it in one"
            )
        else:
            files.add(each)
            left_out.named.add(each)
    if not files:
        raise nothing_found(path, wanted, key, left_out)
    return sorted(files)


def _matches(pattern: Path) -> list[Path]:
    """The paths that match ``pattern``; where none does, with a folder that is there taken as it is written."""
    folder = next((parent for parent in pattern.parents if parent.is_dir()), Path())
    for text in (str(pattern), str(Path(glob.escape(str(folder))) / pattern.relative_to(folder))):
        if found := glob.glob(text, recursive=True):  # noqa: PTH207 - takes any path
            return [Path(name) for name in found]
    return []


def nothing_found(path: str, wanted: str, key: str, left_out: LeftOut) -> ValueError:
    """The error for a folder that has nothing to read."""
    return ValueError("; ".join([f"{key}={path}: there is no {wanted} in this folder", *left_out.notes()]))


def _files_of(
    folder: Path, is_wanted: Callable[[Path], bool], left_out: LeftOut, *, follows_links: bool
) -> Iterator[Path]:
    """The files of ``folder`` that are wanted."""
    for file in _walk(folder, left_out, follows_links=follows_links):
        if is_wanted(file):
            yield file
        else:
            left_out.add(OTHER_ENDING, file, folder)


def _walk(root: Path, left_out: LeftOut, *, follows_links: bool) -> Iterator[Path]:
    """The files below ``root``, hidden ones left out; what links lead to after everything else, and only once."""
    seen: set[tuple[int, int]] = set()  # device and inode of folders and, where links lead to files, of files
    files: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            if folder.is_file():  # a link
                if _is_new(folder, files) or not follows_links:
                    yield folder
                else:
                    left_out.add(CYCLE, folder, root)
                continue
            if not _is_new(folder, seen):
                left_out.add(CYCLE, folder, root)
                continue
            entries = sorted(folder.iterdir())
        except OSError:
            left_out.add(UNREADABLE, folder, root)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                left_out.add(HIDDEN, entry, root)
            elif entry.is_symlink() and entry.exists() and (entry.is_dir() or entry.is_file()):
                if follows_links or entry.is_file():
                    links.append(entry)
                else:
                    left_out.add(CYCLE, entry, root)
            elif entry.is_dir():
                folders.append(entry)
            elif entry.is_file():
                files.add(_identity(entry))
                yield entry
            else:
                left_out.add(NO_FILE, entry, root)


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Add ``path`` to ``seen``; return True if it was not there."""
    identity = _identity(path)
    is_new = identity not in seen
    seen.add(identity)
    return is_new
