"""Files of token ids, in the formats of this and other programs."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Self

import numpy as np

from llmtrain.data.cache.id_width import TokenType, type_beside, type_of_ids
from llmtrain.data.cache.shard_index import INDEX, Shard, ShardIndex

HEADER = np.dtype(("<i4", 256))
LLMC_VERSIONS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): ids; GPT-2's and Llama 3's
LLMC_MAGICS = {magic for magic, _ in LLMC_VERSIONS}


class TokenFileFormat(Enum):
    """The layout of a token file."""

    auto = "from the content: a header of llm.c, an index.json beside the file, else nanogpt"
    llmtrain = "this program's shards, with their index.json"
    nanogpt = "ids alone, of data.dtype"
    llmc = "llm.c's and modded-nanogpt's: 256 int32 (magic, version, number of tokens), then ids as uint16 or uint32"


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids: their place in it, and their type."""

    path: Path
    dtype: str
    offset: int  # bytes before the first id
    tokenizer: str | None = None  # fingerprint of the tokenizer that made them, if known
    sha256: str | None = None  # expected for the content, if known

    @classmethod
    def of_index(cls, folder: Path, index: ShardIndex, shard: Shard) -> Self:
        """One of this program's shards."""
        return cls(folder / shard.name, index.dtype, 0, index.tokenizer, shard.sha256)


def read_indices(folders: Iterable[Path], form: TokenFileFormat) -> dict[Path, ShardIndex]:
    """Read the indices of ``folders``, where there are any.  Raises ValueError for a damaged index or shard."""
    if form not in (TokenFileFormat.auto, TokenFileFormat.llmtrain):
        return {}
    try:
        return {folder: ShardIndex.read(folder) for folder in folders if (folder / INDEX).exists()}
    except ValueError as error:
        raise ValueError(
            f"{error}; restore it from a copy or prepare the shards again (if they are not llmtrain's, name their "
            "data.format)"
        ) from error


def recognise(
    path: Path, form: TokenFileFormat, index: ShardIndex | None, dtype: TokenType, vocab_size: int
) -> TokenFile | None:
    """Recognise the format of a token file; ``index`` is the one of its folder, ``dtype`` for raw ids.

    None if it is not clear of which type its ids are.  Raises ValueError, naming the file, if it is empty, cut or of
    another format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.itemsize)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not size:
        raise ValueError(f"{path}: an empty file")
    for shard in index.shards if index is not None else ():
        if shard.name == path.name:
            assert index is not None
            return TokenFile.of_index(path.parent, index, shard)
    if form is TokenFileFormat.llmtrain:
        raise ValueError(f"{path}: no {INDEX} beside it names it; take data.format=auto")
    magic, version, tokens = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if form is TokenFileFormat.llmc or (form is TokenFileFormat.auto and magic in LLMC_MAGICS):
        if (magic, version) not in LLMC_VERSIONS:
            known = ", ".join(f"{m} version {v}" for m, v in LLMC_VERSIONS)
            raise ValueError(f"{path}: its header has magic {magic} version {version}; llm.c's are {known}")
        file_dtype = LLMC_VERSIONS[magic, version]
        expected = HEADER.itemsize + tokens * np.dtype(file_dtype).itemsize
        if size != expected or tokens <= 0:
            raise ValueError(
                f"{path}: cut or damaged: {size:,} bytes, where its header says {tokens:,} tokens ({expected:,} bytes)"
            )
        return TokenFile(path, file_dtype, HEADER.itemsize)
    if head.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path}: a NumPy file, with a header; write the ids alone, with ids.tofile(NAME)")
    if dtype is not TokenType.auto:
        return _raw(path, size, dtype.dtype)
    if found := type_beside(path, size):
        return _raw(path, size, found)
    if size % 2:
        raise ValueError(f"{path}: cut or no token file: {size:,} bytes is no whole number of uint16 ids")
    found = type_of_ids(path, size, vocab_size)
    return _raw(path, size, found) if found else None


def _raw(path: Path, size: int, dtype: str) -> TokenFile:
    itemsize = np.dtype(dtype).itemsize
    if size % itemsize:
        raise ValueError(f"{path}: cut or no token file: {size:,} bytes is no whole number of ids of {itemsize} bytes")
    return TokenFile(path, dtype, 0)
