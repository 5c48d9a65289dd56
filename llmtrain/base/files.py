"""Atomic files, which are complete or absent (written aside, synced, renamed), and logs that survive a full disk.

Not every file system syncs directories or renames over what is there; what it cannot do is left out or done otherwise.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from llmtrain.base.stored_files import open_regular

REPLACED = ".tmp-replaced-"  # prefix of a directory while a new one takes its place


UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)  # of a call on a file system
NO_REPLACING = (errno.EEXIST, errno.ENOTEMPTY, errno.EPERM, errno.EACCES)  # of a renaming over a file


def exists(path: str | Path) -> bool:
    """Return whether there is something of this name, a broken link too; an impossible name is none."""
    return bool(str(path)) and os.path.lexists(path)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``; a reader, also after a crash, sees the old file or the new one, never a part."""
    with written_whole(path) as file:
        file.write(text)


@contextlib.contextmanager
def written_whole(path: Path, *, binary: bool = False, mode: int | None = None) -> Iterator[IO[Any]]:
    """Open a file that replaces ``path`` once it is complete; after an error ``path`` stays as it was.

    A link at ``path`` is replaced, and none is followed.  ``mode``: the permissions; None: as usual.
    """
    temporary = path.with_name(f".tmp-{path.name[:40]}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process, or a link that somebody put there
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open_descriptor(descriptor, binary=binary) as file:
            if mode is not None:
                os.fchmod(descriptor, mode)
            yield file
            file.flush()
            sync(descriptor)
        replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # the error of a write names no file
    finally:
        temporary.unlink(missing_ok=True)


def open_descriptor(descriptor: int, *, binary: bool) -> IO[Any]:
    """Open a descriptor for writing bytes, or text as UTF-8 with newlines as they are."""
    return open(descriptor, "wb") if binary else open(descriptor, "w", encoding="utf-8", newline="")


def replace(new: Path, path: Path) -> None:
    """Rename a file to ``path``, in place of a file or link of that name.

    A file system that does not rename over a file has the old one renamed first, as :func:`replace_directory` does.
    """
    try:
        new.replace(path)
    except OSError as error:
        if error.errno not in NO_REPLACING or path.is_dir() or not os.path.lexists(path):
            raise
        _replace_in_two(new, path)


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
        descriptor = open_own(self.path, os.O_APPEND)
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


def open_own(path: Path, flags: int = 0) -> int:
    """Open a file that a run changes in place, to read and write, or make it; returns its descriptor.

    Raises OSError for a link, which may point to any file of the user's in a run from elsewhere, and StoredFileError
    for a pipe or device.  A file that has another name too, as in a copy made of hard links, is replaced by a copy
    first, so that the other stays as it is.
    """
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags)
    if os.fstat(descriptor).st_nlink > 1:
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            temporary.unlink(missing_ok=True)
            with os.fdopen(descriptor, "rb") as shared, temporary.open("xb") as own:
                shutil.copyfileobj(shared, own)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return open_own(path, flags)
    return descriptor


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
    if path.exists():
        _replace_in_two(new, path)
    else:
        new.rename(path)
    fsync(path.parent)
    _remove(path.with_name(f"{REPLACED}{path.name}"))


def _replace_in_two(new: Path, path: Path) -> None:
    """Rename ``path`` aside, then ``new`` to it; remove the old one."""
    old = path.with_name(f"{REPLACED}{path.name}")
    _remove(old)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    fsync(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a file, a link or a directory; one that cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sweep_leftovers(directory: Path) -> None:
    """Remove the leftovers of killed writers.  Only the holder of the run's lock may call this."""
    for replaced in directory.glob(f"{REPLACED}*"):
        with contextlib.suppress(OSError):  # the new one is in place: remove the old one below
            replaced.rename(replaced.with_name(replaced.name.removeprefix(REPLACED)))
    for leftover in directory.glob(".tmp-*"):
        _remove(leftover)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file or directory to the disk, where its file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if path.is_dir():  # one that may be written to and not be listed
            return
        raise
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Force an open file or directory to the disk; a file system that cannot do it (EINVAL) keeps to its own time."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
