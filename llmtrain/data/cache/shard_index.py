"""A folder of token shards: little-endian ids in ``train-00000.bin`` …, and ``index.json``, which describes them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np

from llmtrain.base.files import sync

FORMAT = 1
INDEX = "index.json"
SHARD_TOKENS = 128_000_000  # tokens of a shard; the last one of a split is shorter


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitShards:
    """The shards of one split, training or validation: one stream of documents."""

    documents: int
    shards: list[Shard]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @classmethod
    def parse(cls, stored: dict[str, Any]) -> Self:
        """Parse the JSON of a split.  Raises KeyError, TypeError or ValueError if it is damaged."""
        shards = [Shard(**shard) for shard in stored["shards"]]
        for shard in shards:
            if Path(shard.name).name != shard.name:
                raise ValueError(f"{shard.name!r} is not a plain file name")
            if not (isinstance(shard.tokens, int) and isinstance(shard.sha256, str)):
                raise TypeError(f"{shard.name}: tokens {shard.tokens!r}, sha256 {shard.sha256!r}")
        return cls(int(stored["documents"]), shards)


@dataclass(frozen=True)
class ShardIndex:
    """The content of ``index.json``."""

    FORMAT: ClassVar[int | str] = FORMAT

    format: int | str
    dtype: str  # numpy's name of the ids' type: <u2 or <u4
    tokenizer: str  # fingerprint of the tokenizer that made the ids
    train: SplitShards
    validation: SplitShards  # without shards where no document was set aside

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the index of ``folder``.  Raises ValueError unless all of its shards are there in full length."""
        path = folder / INDEX
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found = stored["format"]
            if found == cls.FORMAT:
                index = cls(**cls.parse(stored))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: damaged, or of another version: {what}") from error
        if found != cls.FORMAT:
            raise ValueError(f"{path}: format {found}, this version of the program reads {cls.FORMAT}")
        for shard, itemsize in index.files():
            file, expected = folder / shard.name, shard.tokens * itemsize
            found = file.stat().st_size if file.exists() else None
            if found != expected:
                state = "missing" if found is None else f"has {found} bytes, not {expected}"
                raise ValueError(f"{file}: {state}")
        return index

    @classmethod
    def parse(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """Parse the fields from JSON.  Raises KeyError, TypeError or ValueError for missing or damaged ones."""
        parts = {name: SplitShards.parse(stored[name]) for name in ("train", "validation")}
        return {"format": cls.FORMAT, "dtype": _parse_dtype(stored["dtype"]), "tokenizer": stored["tokenizer"], **parts}

    def files(self) -> Iterator[tuple[Shard, int]]:
        """Yield every file with the bytes of one of its numbers."""
        for shard in self.shards:
            yield shard, np.dtype(self.dtype).itemsize

    @property
    def shards(self) -> list[Shard]:
        return self.train.shards + self.validation.shards

    def write(self, folder: Path) -> None:
        """Write ``index.json`` into ``folder``, the last of its files."""
        with (folder / INDEX).open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            sync(file.fileno())


@dataclass(frozen=True)
class TextIndex(ShardIndex):
    """The index of tokenised text, with what a user should know of it; older entries know nothing."""

    split: str = ""  # a line about the text that validates
    notes: list[str] = field(default_factory=list)  # messages about text that was left out

    @classmethod
    def parse(cls, stored: dict[str, Any]) -> dict[str, Any]:
        facts = {"split": str(stored.get("split", "")), "notes": list(map(str, stored.get("notes", [])))}
        return super().parse(stored) | facts


def _parse_dtype(name: str) -> str:
    if name not in ("<u2", "<u4"):
        raise ValueError(f"ids of type {name!r}")
    return name


class ShardWriter:
    """Writer of the shards of one split."""

    def __init__(self, folder: Path, name: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
        self.documents = 0
        self.shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._tokens = 0

    def write(self, ids: np.ndarray, documents: int) -> None:
        """Append ``ids``, in which ``documents`` documents end."""
        self.documents += documents
        while len(ids):
            if self._file is None:
                self._file = self._path.open("wb")
            here = ids[: self.shard_tokens - self._tokens]
            data = np.ascontiguousarray(here).data
            self._file.write(data)
            self._digest.update(data)
            self._tokens += len(here)
            ids = ids[len(here) :]
            if self._tokens == self.shard_tokens:
                self._finish_shard()

    def close(self) -> SplitShards:
        """Finish the last shard and describe all of them."""
        if self._file is not None:
            self._finish_shard()
        return SplitShards(self.documents, self.shards)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}-{len(self.shards):05d}.bin"

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        sync(self._file.fileno())
        self._file.close()
        self.shards.append(Shard(self._path.name, self._tokens, self._digest.hexdigest()))
        self._file, self._digest, self._tokens = None, hashlib.sha256(), 0
