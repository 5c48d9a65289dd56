"""Folders from which compiled code is loaded: nobody else may have written what this process runs.

A file is trusted if its owner is this user or root and nobody else may write to it, and a folder likewise.  The path
to a folder may lead through places where others may write: files are opened relative to the folder itself, once it has
been checked, so that exchanging the path later changes nothing.
"""

import atexit
import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmtrain.base.files import sync
from llmtrain.base.process import cache_folder

log = logging.getLogger(__name__)
COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # the compiler's variable
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotTrusted(OSError):
    """A folder or file from which no code may be loaded; the message names it and says why."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EPERM, message)


@contextlib.contextmanager
def private_folder(path: Path) -> Iterator[int]:
    """Open a folder that only this user writes to; yields its descriptor.  It is made if it is not there.

    A folder of this user's that others may write to is closed to them.  Raises :class:`NotTrusted` for a link and for
    a folder of somebody else's, OSError if it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise NotTrusted(f"{path}: a link or a file, where a folder of this program has to be; remove it") from error
    try:
        found = os.fstat(folder)
        if found.st_uid not in (os.geteuid(), 0):
            raise NotTrusted(f"{path}: belongs to another user (uid {found.st_uid}), whose code is not loaded")
        if found.st_mode & OTHERS_WRITE:
            if found.st_uid != os.geteuid():
                raise NotTrusted(f"{path}: others may write to it, so that no code is loaded from it")
            os.fchmod(folder, stat.S_IMODE(found.st_mode) & ~OTHERS_WRITE)
        yield folder
    finally:
        os.close(folder)


def open_trusted(folder: int, name: str, digest: str) -> int | None:
    """Open the file ``name`` of an opened private folder if it is trusted and has the sha256 ``digest``; else None.

    ``digest`` may be cut to its first characters.
    """
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    found = os.fstat(file)
    is_ours = stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and found.st_nlink == 1
    if is_ours and not found.st_mode & OTHERS_WRITE:
        with os.fdopen(file, "rb", closefd=False) as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest().startswith(digest):
                return file
    os.close(file)
    return None


def write_trusted(folder: int, name: str, content: bytes) -> None:
    """Write a file into an opened private folder, whole or not at all: synced before it gets its name."""
    temporary = f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=folder)
    try:
        with os.fdopen(file, "wb") as opened:
            os.fchmod(file, 0o644)
            opened.write(content)
            opened.flush()
            sync(file)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        sync(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def prepare_compiler_cache() -> None:
    """Name the folder in which torch's compiler keeps code between runs; call it before anything is compiled.

    A folder that the user has named stays.  Ours is in the cache, or, if others may write there, in the user's usual
    cache, or in a temporary folder of this process.
    """
    if COMPILER_CACHE in os.environ:
        return
    for folder in dict.fromkeys([cache_folder() / "compiled", Path("~/.cache/llmtrain/compiled").expanduser()]):
        with contextlib.suppress(OSError), private_folder(folder):
            if not others_may_exchange(folder):
                os.environ[COMPILER_CACHE] = str(folder)
                return
    folder = Path(tempfile.mkdtemp(prefix="llmtrain-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log.warning("%s: others may write there; torch's compiler starts anew in %s", cache_folder(), folder)
    os.environ[COMPILER_CACHE] = str(folder)


def others_may_exchange(path: Path) -> bool:
    """Return whether somebody else could put another folder in the place of ``path``, which need not be there.

    That is so if a link of theirs leads to it, or if a folder above it is theirs or open to them and not sticky, as
    ``/tmp`` is.  A group whose only member is this user counts as this user.
    """
    for at in (path, *path.parents):
        with contextlib.suppress(FileNotFoundError):
            found = at.lstat()
            if found.st_uid not in (os.geteuid(), 0):
                return True
            if stat.S_ISLNK(found.st_mode):
                return others_may_exchange(at.parent.resolve()) or others_may_exchange(at.resolve())
            allowed = found.st_mode & OTHERS_WRITE
            if at != path and found.st_mode & stat.S_ISVTX:
                continue
            if allowed & stat.S_IWOTH or (allowed and not _is_own_group(found.st_gid)):
                return True
    return False


def _is_own_group(group: int) -> bool:
    """Return whether only this user is a member: many systems give each user such a group, and open new files to it."""
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == user.pw_name and user.pw_gid == group and set(entry.gr_mem) <= {user.pw_name}
