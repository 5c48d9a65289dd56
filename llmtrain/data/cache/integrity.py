"""Check token files before training: one pass over each file gives its sha256 and its largest id.

Both are remembered with the file's size and times, so that the next start does not read the file again.
"""

import errno
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from llmtrain.data.cache.shard_index import INDEX
from llmtrain.data.cache.token_file import TokenFile
from llmtrain.data.cache.token_reader import BLOCK, OpenFile, TokenSlice
from llmtrain.data.sources.files import Stamp, remember, stamp


class DamagedFile(ValueError):
    """A file whose content does not match its index; the message names it."""


def open_checked(
    files: Sequence[TokenFile], vocab_size: int, cache_dir: Path, *, verify: bool = False
) -> list[TokenSlice]:
    """Open ``files`` after checking their sha256 and that all ids are in the vocabulary.

    What was learnt is remembered in ``cache_dir``; with ``verify`` all files are read again.  Raises ValueError, naming
    the file and the problem; :class:`DamagedFile` where a copy would help.
    """
    before = [stamp(file.path) for file in files]
    digests: dict[Path, str] = {}
    for dtype, offset in sorted({(file.dtype, file.offset) for file in files}):
        alike = {file.path: file for file in files if (file.dtype, file.offset) == (dtype, offset)}
        memo = cache_dir / f"tokens-{dtype[1:]}-{offset}.json"
        facts = remember(memo, list(alike), partial(_learn, dtype=dtype, offset=offset), verify=verify)
        for (path, file), (digest, largest) in zip(alike.items(), facts, strict=True):
            digests[path] = digest
            if file.sha256 in (None, digest) and largest >= vocab_size:
                _explain_ids(file, vocab_size)
    for file in files:
        if file.sha256 not in (None, digests[file.path]):
            _explain_digest(file, digests[file.path], files)
    return [_open(file, digests[file.path], was) for file, was in zip(files, before, strict=True)]


def _open(file: TokenFile, digest: str, was: Stamp) -> TokenSlice:
    try:
        opened = OpenFile(file.path, digest)
    except OSError as error:
        remedy = "; allow more with: ulimit -n 65536" if error.errno == errno.EMFILE else ""
        raise ValueError(f"{file.path}: {error.strerror}{remedy}") from error
    if opened.stamp != was:
        raise ValueError(f"{file.path}: changed while it was read; start again when it is complete")
    dtype = np.dtype(file.dtype)
    return TokenSlice(opened, dtype, file.offset, (was[0] - file.offset) // dtype.itemsize)


def _learn(path: Path, dtype: str, offset: int) -> list:
    """Compute the sha256 of the whole file, and its largest id."""
    digest, largest = hashlib.sha256(), 0
    for data, ids in _read(path, dtype, offset):
        digest.update(data)
        largest = max(largest, int(ids.max(initial=0)))
    return [digest.hexdigest(), largest]


def _read(path: Path, dtype: str, offset: int) -> Iterator[tuple[memoryview, np.ndarray]]:
    """Yield a file in blocks, as bytes and as ids; the first block is what precedes the ids."""
    ids = np.empty(BLOCK // np.dtype(dtype).itemsize, dtype)
    data = ids.view(np.uint8).data
    try:
        with path.open("rb") as stream:
            yield data[: stream.readinto(data[:offset])], ids[:0]
            while count := stream.readinto(data):
                yield data[:count], ids[: count // ids.itemsize]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _explain_ids(file: TokenFile, vocab_size: int) -> None:
    begin = 0
    for _, ids in _read(file.path, file.dtype, file.offset):
        if (beyond := np.flatnonzero(ids >= vocab_size)).size:
            raise ValueError(
                f"{file.path}: token {begin + int(beyond[0]):,} is {ids[beyond[0]]}, beyond the tokenizer's vocabulary "
                f"of {vocab_size:,}; take the tokenizer that made the file, or name data.dtype, the type "
                "of its ids, or its data.format"
            )
        begin += len(ids)


def _explain_digest(file: TokenFile, found: str, files: Sequence[TokenFile]) -> None:
    others = [other.path.name for other in files if other.sha256 == found]
    what = f"its content is that of {others[0]}: shards were exchanged" if others else "its content has been changed"
    raise DamagedFile(f"{file.path}: its sha256 is not the one in {INDEX}: {what}")
