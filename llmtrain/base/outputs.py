"""Outputs that a user names, as in ``output=rows.jsonl``: checked before the work, then written.

A new name or a regular file is written aside and gets its name once it is complete.  A link stays, and the file that it
names is replaced.  A pipe or a character device is written to as it is and never replaced; ``-`` and ``/dev/stdout``
are the standard output.  Anything else is refused.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llmtrain.base.files import open_descriptor, written_whole

STDOUT = "-"
NAME_BYTES = 255  # of a file or directory, on all usual file systems
DESCRIPTORS = {STDOUT: 1, "/dev/stdout": 1, "/dev/stderr": 2}
# Errors that mean that the name is wrong, not that the machine failed.
NAMING = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ETXTBSY, errno.EINVAL, errno.EBADF, errno.ENXIO,
)  # fmt: skip


def is_stream(name: str) -> bool:
    """Return whether ``name`` is standard output, a pipe or a device: its writer sees no name and no end of a file."""
    return _descriptor(name) is not None or _kind(Path(name)) in (stat.S_IFIFO, stat.S_IFCHR)


def is_stdout(name: str | None) -> bool:
    """Return whether ``name`` is the standard output."""
    return name is not None and _descriptor(name) == 1


@contextlib.contextmanager
def naming(key: str, name: str) -> Iterator[None]:
    """Turn an OSError that comes from a wrong name into a ValueError that names ``key``."""
    try:
        yield
    except OSError as error:
        if error.errno not in NAMING:
            raise
        place = f" ({error.filename})" if error.filename and str(error.filename) != name else ""
        raise ValueError(f"{key}={name}: {error.strerror}{place}; name another place") from error


def check_output(key: str, name: str) -> None:
    """Raise ValueError unless a file of this name can be written as this module does; nothing is changed."""
    descriptor = _descriptor(name)
    with naming(key, name):
        if descriptor is not None:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise ValueError(f"{key}={name}: open for reading only; name a file, or {STDOUT} for standard output")
            return
        _check(key, name, Path(name))


def _check(key: str, name: str, path: Path) -> None:
    kind = _kind(path)
    if not name or name.endswith("/") or kind == stat.S_IFDIR:
        raise ValueError(f"{key}={name}: a directory, not a file; name a file in it")
    if kind is None and path.is_symlink():
        raise ValueError(f"{key}={name}: a link to {path.readlink()}, which is not there; name the file itself")
    if kind in (stat.S_IFBLK, stat.S_IFSOCK):
        what = "a disk" if kind == stat.S_IFBLK else "a socket"
        raise ValueError(f"{key}={name}: {what}, which is not written to; name a file, or {STDOUT} for standard output")
    if kind == stat.S_IFREG:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))  # as the system sees it: write-protected, another's link
    if kind not in (None, stat.S_IFREG):
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{key}={name}: there is no directory {path.absolute().parent}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={name}: the directory {folder} cannot be written to; name another place")


@contextlib.contextmanager
def open_output(key: str, name: str, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Open what :func:`check_output` accepts.  After an error a file is as it was, and a new name is not there."""
    check_output(key, name)
    descriptor = _descriptor(name)
    if descriptor is not None:
        if descriptor == 1:
            sys.stdout.flush()
        with naming(key, name):
            descriptor = os.dup(descriptor)
    elif is_stream(name):
        descriptor = _open_stream(key, name)
    if descriptor is not None:
        try:
            with open_descriptor(descriptor, binary=binary) as file:
                yield file
        except BrokenPipeError as error:
            raise BrokenPipeError(error.errno, error.strerror, None if is_stdout(name) else name) from error
        return
    path = Path(name).resolve()
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    with written_whole(path, binary=binary, mode=mode) as file:
        yield file


def _open_stream(key: str, name: str) -> int:
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise ValueError(f"{key}={name}: no process reads this pipe; start one first, as in: cat {name} &") from error
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return descriptor


def _descriptor(name: str) -> int | None:
    """Return the number of the open descriptor that ``name`` stands for."""
    if name in DESCRIPTORS:
        return DESCRIPTORS[name]
    match = re.fullmatch(r"/(?:dev|proc/self|proc/thread-self)/fd/(\d+)", name)
    return int(match[1]) if match else None


def _kind(path: Path) -> int | None:
    """Return the type of file that ``path`` names, through links; None if there is none."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


# --- directories ------------------------------------------------------------------------------------------------------


def check_output_directory(key: str, name: str) -> None:
    """Raise ValueError unless a directory of this name is there and can be written to, or can be made."""
    if not name or name == STDOUT:
        raise ValueError(f"{key}={name}: must be a directory")
    with naming(key, name):
        path = Path(name).absolute()
        while not os.path.lexists(path):
            path = path.parent
        if not path.is_dir():
            raise ValueError(f"{key}={name}: {path} is not a directory; name another place")
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"{key}={name}: the directory {path} cannot be written to; name another place")
        if any(len(os.fsencode(part)) > NAME_BYTES for part in Path(name).parts):
            raise ValueError(f"{key}={name}: a name in it is longer than {NAME_BYTES} bytes; name a shorter one")
