"""Text is tokenised once: a cache of token shards, keyed by the text's content and the tokenizer.

An entry is written in a temporary folder, synced and renamed, so it is whole or absent.  A lock that dies with its
process makes a second process wait for the first instead of doing the same work.  Every shard is compared with its
sha256 before it is used; an entry that is damaged is made again.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from llmtrain.data.cache.document_encoder import dtype_of, encode_documents
from llmtrain.data.cache.integrity import open_checked
from llmtrain.data.cache.shard_index import FORMAT, SHARD_TOKENS, ShardIndex, ShardWriter, sync
from llmtrain.data.cache.token_file import TokenFile
from llmtrain.data.cache.token_reader import DataError, TokenSlice
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.tokenizer import Tokenizer

T = TypeVar("T")
log = logging.getLogger(__name__)
TEMPORARY = ".tmp-"
REPORT_SECONDS = 10


@dataclass(frozen=True)
class DocumentSource:
    """Documents to be tokenised."""

    name: str  # for people
    content: str  # changes whenever the documents do
    pieces: Callable[
        [], Iterator[DocumentPiece]
    ]  # the documents, in order; raises ValueError where they cannot be read


@dataclass(frozen=True)
class TokenCacheEntry:
    """A whole entry of the cache, every byte of it as it was written."""

    folder: Path  # its name stands for text, tokenizer and split
    index: ShardIndex
    train: list[TokenSlice]
    validation: list[TokenSlice]

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer, *, verify: bool = False) -> Self:
        """Open and check the entry ``folder``.  Raises ValueError, naming the file, if it is missing or damaged."""
        index = ShardIndex.read(folder)
        files = [TokenFile.of_index(folder, index, shard) for shard in index.shards]
        tokens = open_checked(files, tokenizer.vocab_size, folder.parent, verify=verify)
        train = len(index.train.shards)
        return cls(folder, index, tokens[:train], tokens[train:])


def prepare(
    source: DocumentSource,
    tokenizer: Tokenizer,
    validation_fraction: float,
    cache_dir: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    verify: bool = False,
) -> TokenCacheEntry:
    """The shards of ``source``, from the cache, or made now.

    Every ``1 / validation_fraction``-th document is for validation, if there are as many; else none is.  With
    ``verify`` every byte of an entry is read again, and a damaged one stays as it is.  Raises ValueError if the
    source cannot be read or has no text, the cache cannot be written, or ``verify`` finds damage;
    :class:`DataError` if a document cannot be tokenised.
    """
    parts = [FORMAT, source.content, validation_fraction, tokenizer.fingerprint]

    def fill(folder: Path) -> None:
        _write_shards(folder, source, tokenizer, validation_fraction, shard_tokens)

    def open_entry(folder: Path, verify: bool) -> TokenCacheEntry:
        return TokenCacheEntry.open(folder, tokenizer, verify=verify)

    return find_or_make(cache_dir, parts, open_entry, fill, source.name, verify=verify)


def find_or_make(
    cache_dir: Path,
    key: list[Any],
    open_entry: Callable[[Path, bool], T],
    fill: Callable[[Path], None],
    name: str,
    *,
    verify: bool = False,
) -> T:
    """What ``open_entry(folder, verify)`` gives of the entry for ``key``, JSON-ready values, which is made if need be.

    ``fill`` writes the files of an entry into a folder that nobody sees before it is whole; ``open_entry`` raises
    ValueError for one that is damaged.  Raises as :func:`prepare` does.
    """
    folder = cache_dir / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if folder.exists():
        try:
            return open_entry(folder, verify)
        except ValueError as error:
            if verify:
                raise ValueError(f"{error}; remove {folder}, and the next start tokenises the text again") from error
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if folder.exists():  # damaged, if another process has not made it while this one waited
                try:
                    return open_entry(folder, False)
                except ValueError as error:
                    log.warning("data cache: %s; the text is tokenised again", error)
            _sweep(cache_dir)
            _make(folder, fill, name)
            return open_entry(folder, False)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache_dir}: {error.strerror}; name a writable place with room: data.cache_dir=DIR"
        ) from error


def _make(folder: Path, fill: Callable[[Path], None], name: str) -> None:
    log.info("tokenising %s into %s", name, folder)
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a writer that died
    temporary.mkdir()
    try:
        fill(temporary)
        _sync_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        temporary.rename(folder)
        _sync_folder(folder.parent)
    except DataError as error:
        raise DataError(f"tokenising {name}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(
    folder: Path, source: DocumentSource, tokenizer: Tokenizer, validation_fraction: float, shard_tokens: int
) -> None:
    train = ShardWriter(folder, "train", shard_tokens)
    validation = ShardWriter(folder, "validation", shard_tokens)
    tokens, reported = 0, time.monotonic()
    for encoded in encode_documents(source.pieces(), tokenizer, validation_fraction):
        (validation if encoded.is_validation else train).write(encoded.ids, encoded.documents)
        tokens += len(encoded.ids)
        if time.monotonic() - reported > REPORT_SECONDS:
            log.info("tokenising %s: %.1f M tokens so far", source.name, tokens / 1e6)
            reported = time.monotonic()
    if not tokens:
        raise ValueError(f"{source.name}: there is no text in it; name other data: data.path=…")
    ShardIndex(
        FORMAT, dtype_of(tokenizer.vocab_size).str, tokenizer.fingerprint, train.close(), validation.close()
    ).write(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


# --- one writer at a time ----------------------------------------------------------------------------------------


def _temporary(folder: Path) -> Path:
    return folder.with_name(TEMPORARY + folder.name)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with folder.with_suffix(".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which makes %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(cache_dir: Path) -> None:
    """Remove what writers that died have left: temporary folders whose lock nobody holds."""
    for temporary in cache_dir.glob(f"{TEMPORARY}*/"):
        folder = temporary.with_name(temporary.name.removeprefix(TEMPORARY))
        with folder.with_suffix(".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(temporary, ignore_errors=True)
