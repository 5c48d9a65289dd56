"""Atomic files, which are complete or absent (written aside, synced, renamed), and logs that survive a full disk."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

REPLACED = ".tmp-replaced-"  # prefix of a directory while a new one takes its place


def exists(path: str | Path) -> bool:
    """Return whether there is something of this name, a broken link too; an impossible name is none."""
    return bool(str(path)) and os.path.lexists(path)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``; a reader, also after a crash, sees the old file or the new one, never a part."""
    with written_whole(path) as file:
        file.write(text)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """Open a text file that replaces ``path`` once it is complete; after an error ``path`` stays as it was."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # the error of a write names no file
    finally:
        temporary.unlink(missing_ok=True)


class AppendedFile:
    """A log file: each line has left the process when :meth:`append` returns.

    While the disk is full, lines wait in memory and are written first once there is room: a full log does not end a
    run, and no line is torn or lost unless the process ends before that.  After a torn line the next process starts a
    new one.  The first line creates the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._waiting = b""  # starts at the beginning of a line
        self._written = 0  # bytes of it that are in the file already, a torn line

    def append(self, text: str) -> None:
        """Write ``text``, which ends with a newline.  Raises OSError for anything but a full disk."""
        self._waiting += text.encode("utf-8", errors="backslashreplace")
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            while self._written < len(self._waiting):
                self._written += os.write(self._descriptor, self._waiting[self._written :])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
        whole = self._waiting.rfind(b"\n", 0, self._written) + 1
        self._waiting, self._written = self._waiting[whole:], self._written - whole

    def _open(self) -> int:
        # Not through a link: in a run from elsewhere it may point to any file of the user's.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            self._written = 0  # a torn line is gone: the file was rewritten
        elif self._written == 0:  # torn by an earlier process
            self._waiting = b"\n" + self._waiting
        return descriptor

    def rewrite(self, change: Callable[[], None]) -> None:
        """Call ``change()``, which may replace the file, and append to the new one from then on."""
        self.close()
        change()

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._waiting:
            self.append("")
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def share(path: Path) -> None:
    """Give a file the permissions of its directory: safetensors creates files that only their owner can read."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise OSError if the disk of ``folder`` has less room than ``needed_bytes``."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes:,} bytes are needed and {free:,} are free", str(folder))


def replace_directory(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``.

    An older directory of that name is renamed first.  It is restored if the second renaming fails, or, after a kill
    between the two, by :func:`sweep_leftovers`.
    """
    old = path.with_name(f"{REPLACED}{path.name}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep_leftovers(directory: Path) -> None:
    """Remove the leftovers of killed writers.  Only the holder of the run's lock may call this."""
    for replaced in directory.glob(f"{REPLACED}*"):
        with contextlib.suppress(OSError):  # the new one is in place: remove the old one below
            replaced.rename(replaced.with_name(replaced.name.removeprefix(REPLACED)))
    for leftover in directory.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
