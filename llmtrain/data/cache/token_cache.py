"""The cache of token shards, keyed by the text's content and the tokenizer: text is tokenised once.

Every shard is compared with its sha256 before it is used; a damaged entry is made again.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llmtrain.data.cache.document_encoder import dtype_of, encode_documents
from llmtrain.data.cache.entries import find_or_make
from llmtrain.data.cache.integrity import open_checked
from llmtrain.data.cache.shard_index import FORMAT, SHARD_TOKENS, ShardIndex, ShardWriter
from llmtrain.data.cache.token_file import TokenFile
from llmtrain.data.cache.token_reader import TokenSlice
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.tokenizer import Tokenizer

log = logging.getLogger(__name__)
REPORT_SECONDS = 10


@dataclass(frozen=True)
class DocumentSource:
    """Documents to tokenise."""

    name: str  # for messages
    content: str  # changes whenever the documents do
    pieces: Callable[[], Iterator[DocumentPiece]]  # of the documents, in order; raises ValueError if unreadable


@dataclass(frozen=True)
class TokenCacheEntry:
    """An intact entry of the cache: every byte as it was written."""

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
    """Find the shards of ``source`` in the cache, or make them.

    Every ``1 / validation_fraction``-th document is for validation; none is if there are fewer.  With ``verify`` every
    byte of an entry is read again, and a damaged one stays as it is.  Raises ValueError if the
    source cannot be read or has no text, the cache cannot be written, or ``verify`` finds damage;
    :class:`DataError` if a document cannot be tokenised.
    """
    parts = [FORMAT, source.content, validation_fraction, tokenizer.fingerprint]

    def fill(folder: Path) -> None:
        _write_shards(folder, source, tokenizer, validation_fraction, shard_tokens)

    def open_entry(folder: Path, verify: bool) -> TokenCacheEntry:
        return TokenCacheEntry.open(folder, tokenizer, verify=verify)

    return find_or_make(cache_dir, parts, open_entry, fill, source.name, verify=verify)


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
