"""The cache of token shards, keyed by the text's content and the tokenizer: text is tokenised once.

Every shard is compared with its sha256 before it is used; a damaged entry is made again.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from llmtrain.data.cache.document_encoder import EncodedText, dtype_of, encode_documents
from llmtrain.data.cache.document_store import DocumentStore
from llmtrain.data.cache.entries import find_or_make
from llmtrain.data.cache.integrity import open_checked
from llmtrain.data.cache.shard_index import FORMAT, SHARD_TOKENS, ShardWriter, TextIndex
from llmtrain.data.cache.token_file import TokenFile
from llmtrain.data.cache.token_reader import TokenSlice
from llmtrain.data.order.document_split import Split
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.data.sources.search import LeftOut
from llmtrain.tokenizer import Tokenizer

log = logging.getLogger(__name__)
REPORT_SECONDS = 10


class Documents(NamedTuple):
    """Documents to tokenise."""

    content: str  # changes whenever the documents do
    pieces: Callable[[], Iterator[DocumentPiece]]  # of the documents, in order; raises ValueError if unreadable


@dataclass(frozen=True)
class DocumentSource:
    """The documents of a corpus."""

    name: str  # for messages
    content: str  # changes whenever the documents do
    pieces: Callable[[], Iterator[DocumentPiece]]  # of the documents, in order; raises ValueError if unreadable
    validation: Documents | None = None  # those that validate; None: a share of the others
    left_out: tuple[LeftOut, ...] = ()  # the files that are not read
    notes: Callable[[], list[str]] = list  # messages about what was read, after all pieces


@dataclass(frozen=True)
class TokenCacheEntry:
    """An intact entry of the cache: every byte as it was written."""

    folder: Path  # its name stands for text, tokenizer and split
    index: TextIndex
    train: list[TokenSlice]
    validation: list[TokenSlice]

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer, *, verify: bool = False) -> Self:
        """Open and check the entry ``folder``.  Raises ValueError, naming the file, if it is missing or damaged."""
        index = TextIndex.read(folder)
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
    split: Split = Split.documents,
    shard_tokens: int = SHARD_TOKENS,
    verify: bool = False,
) -> TokenCacheEntry:
    """Find the shards of ``source`` in the cache, or make them.

    Without documents for validation, ``split`` sets ``validation_fraction`` of the text aside.  With ``verify`` every
    byte of an entry is read again, and a damaged one stays as it is.  Raises ValueError if the source cannot be read or
    has no text, the cache cannot be written, or ``verify`` finds damage; :class:`DataError` if a document cannot be
    tokenised.
    """
    parts = [FORMAT, source.content, validation_fraction, tokenizer.fingerprint]
    by_tokens = split is Split.tokens and validation_fraction > 0
    if source.validation is not None:
        parts = [FORMAT, source.content, tokenizer.fingerprint, "validation", source.validation.content]
    elif by_tokens:
        parts.append("tokens-1")

    def fill(folder: Path) -> None:
        writing = _Writing(folder, source, tokenizer, shard_tokens)
        if source.validation is not None:
            writing.write_both(source.validation)
        elif by_tokens:
            writing.write_by_tokens(validation_fraction)
        else:
            writing.write_by_documents(validation_fraction)
        writing.finish()

    def open_entry(folder: Path, verify: bool) -> TokenCacheEntry:
        return TokenCacheEntry.open(folder, tokenizer, verify=verify)

    return find_or_make(cache_dir, parts, open_entry, fill, source.name, verify=verify)


class _Writing:
    """The files of an entry while they are written."""

    def __init__(self, folder: Path, source: DocumentSource, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.folder, self.source, self.tokenizer = folder, source, tokenizer
        self.train = ShardWriter(folder, "train", shard_tokens)
        self.validation = ShardWriter(folder, "validation", shard_tokens)
        self.split = ""
        self.tokens = 0

    def write_by_documents(self, fraction: float) -> None:
        for encoded in self._encode(self.source.pieces(), fraction):
            (self.validation if encoded.is_validation else self.train).write(encoded.ids, encoded.documents)

    def write_by_tokens(self, fraction: float) -> None:
        with DocumentStore(self.folder, dtype_of(self.tokenizer.vocab_size)) as store:
            for encoded in self._encode(self.source.pieces(), 0):
                store.append(encoded)
            if self.tokens:
                self.split = store.distribute(self.train, self.validation, fraction, self.tokenizer)

    def write_both(self, validation: Documents) -> None:
        for encoded in self._encode(self.source.pieces(), 0):
            self.train.write(encoded.ids, encoded.documents)
        self._check()
        self.tokens = 0
        for encoded in self._encode(validation.pieces(), 0):
            self.validation.write(encoded.ids, encoded.documents)

    def finish(self) -> None:
        self._check()
        ids, tokenizer = dtype_of(self.tokenizer.vocab_size).str, self.tokenizer.fingerprint
        shards = self.train.close(), self.validation.close()
        TextIndex(FORMAT, ids, tokenizer, *shards, self.split, self.source.notes()).write(self.folder)

    def _check(self) -> None:
        if not self.tokens:
            what = "; ".join([f"{self.source.name}: there is no text in it", *self.source.notes()])
            raise ValueError(f"{what}; name other data: data.path=…")

    def _encode(self, pieces: Iterable[DocumentPiece], fraction: float) -> Iterator[EncodedText]:
        reported = time.monotonic()
        for encoded in encode_documents(pieces, self.tokenizer, fraction):
            yield encoded
            self.tokens += len(encoded.ids)
            if time.monotonic() - reported > REPORT_SECONDS:
                log.info("tokenising %s: %.1f M tokens so far", self.source.name, self.tokens / 1e6)
                reported = time.monotonic()
