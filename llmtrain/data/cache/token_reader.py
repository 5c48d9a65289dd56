"""Read token ids from files by position, and notice files that are changed or cut while in use."""

import hashlib
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Self

import numpy as np

log = logging.getLogger(__name__)
BLOCK = 1 << 22  # bytes read at once when a whole file is read


class DataError(RuntimeError):
    """Data that cannot be read or tokenised during a run; the message names the place.  Not a mistake of the user."""


class OpenFile:
    """A file that is read by position and must stay as it was when it was checked.

    It is not mapped into memory: if a mapped file is cut or its disk fails, the system kills the process without a
    message.  A file that is replaced or removed by name is still read as it was; a file that is written to is noticed.

    Args:
        path: the file.
        sha256: of its content, as checked.

    Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        self.path = path
        self.sha256 = sha256
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.stamp = self._stamp()
        self._checking = threading.Lock()

    def read(self, position: int, out: np.ndarray) -> None:
        """Fill ``out``, contiguous uint8, with the bytes from ``position`` on.  Raises :class:`DataError`."""
        count = self._read(position, out)
        while count < len(out):  # rare: a file system that returns less than requested
            more = self._read(position + count, out[count:])
            if not more:
                raise DataError(
                    f"{self.path}: cut while in use: it ends before byte {position + len(out):,}; it had "
                    f"{self.stamp[0]:,} bytes when it was checked"
                )
            count += more

    def check(self) -> None:
        """Raise :class:`DataError` if the content has changed.  Cheap while nobody writes to the file."""
        if self._stamp() == self.stamp:
            return
        with self._checking:
            now = self._stamp()
            if now == self.stamp:
                return
            if now[0] != self.stamp[0]:
                what = f"it has {now[0]:,} bytes, and had {self.stamp[0]:,} when it was checked"
                raise DataError(f"{self.path}: changed while in use: {what}")
            if self._digest() != self.sha256 or self._stamp() != now:
                raise DataError(f"{self.path}: changed while in use: it was written to, and its content has changed")
            log.warning("%s: touched while in use; its content is the same", self.path)
            self.stamp = now

    def _stamp(self) -> tuple[int, int]:
        try:
            stat = os.fstat(self._descriptor)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from error
        return stat.st_size, stat.st_mtime_ns

    def _read(self, position: int, out: np.ndarray) -> int:
        try:
            return os.preadv(self._descriptor, [out.data], position)
        except OSError as error:
            raise DataError(f"{self.path}: byte {position:,}: {error.strerror}") from error

    def _digest(self) -> str:
        digest, block, position = hashlib.sha256(), np.empty(BLOCK, np.uint8), 0
        while count := self._read(position, block):
            digest.update(block.data[:count])
            position += count
        return digest.hexdigest()


class TokenSlice:
    """A stretch of the token ids of a file: ``length`` ids of ``dtype`` from byte ``offset`` on.

    Slicing works as for an array and reads nothing.
    """

    def __init__(self, file: OpenFile, dtype: np.dtype, offset: int, length: int) -> None:
        self.file = file
        self.dtype = dtype
        self._offset = offset
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, stretch: slice) -> Self:
        begin, end, step = stretch.indices(self._length)
        assert step == 1
        offset = self._offset + begin * self.dtype.itemsize
        return type(self)(self.file, self.dtype, offset, max(end - begin, 0))

    def read(self, begin: int, out: np.ndarray) -> None:
        """Fill ``out``, contiguous, with the ids from ``begin`` on.  Raises :class:`DataError`."""
        if out.dtype != self.dtype:  # other files of the stream have wider ids
            ids = np.empty(len(out), self.dtype)
            self.read(begin, ids)
            out[:] = ids
            return
        self.file.read(self._offset + begin * self.dtype.itemsize, out.view(np.uint8))

    def check(self) -> None:
        """Raise :class:`DataError` if the file has changed."""
        self.file.check()
