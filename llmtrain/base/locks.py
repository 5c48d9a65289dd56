"""Locks on open files (``flock``), which end with their process; some file systems have none."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def lock(descriptor: int, *, wait: bool = True, shared: bool = False) -> bool:
    """Lock an open file; return False where its file system has no locks.

    Raises BlockingIOError if another process has locked it and ``wait`` is False.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock of the file ``path``, which is made; yields False where the file system has no locks.

    A link at ``path`` is not followed.  ``waiting`` is called if another process holds the lock, before waiting for
    it.  Raises OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        try:
            is_locked = lock(descriptor, wait=False)
        except BlockingIOError:
            waiting()
            is_locked = lock(descriptor)
        yield is_locked
    finally:
        os.close(descriptor)
