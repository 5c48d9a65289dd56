"""Examples in the cache: a folder with token ids, lengths and labels, and ``index.json``, which describes them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from llmtrain.data.cache.integrity import open_checked
from llmtrain.data.cache.shard_index import Shard, ShardIndex, SplitShards
from llmtrain.data.cache.token_file import TokenFile
from llmtrain.data.cache.token_reader import TokenSlice
from llmtrain.data.examples import ExampleStore
from llmtrain.tokenizer import Tokenizer

FORMAT = "examples-2"
EARLIER_FORMAT = "examples-1"  # in the fingerprints of runs whose examples have not changed since


def digest_of(has_targets: bool, labels: Sequence[str], notes: Sequence[str], is_new: bool) -> str:
    """sha256 of the facts that only the index holds."""
    return hashlib.sha256(json.dumps([has_targets, list(labels), list(notes), is_new]).encode()).hexdigest()


@dataclass(frozen=True)
class ExampleIndex(ShardIndex):
    """The content of ``index.json`` in a folder of examples."""

    FORMAT = FORMAT

    train_examples: SplitShards  # pairs of int64: number of inputs and label of each example
    validation_examples: SplitShards
    has_targets: bool
    labels: list[str]
    notes: list[str]
    is_new: bool  # a version that wrote EARLIER_FORMAT made other examples of the same files
    sha256: str  # of has_targets, labels, notes and is_new; each shard has its own

    @classmethod
    def parse(cls, stored: dict[str, Any]) -> dict[str, Any]:
        parts = {name: SplitShards.parse(stored[name]) for name in ("train_examples", "validation_examples")}
        labels, notes = list(map(str, stored["labels"])), list(map(str, stored["notes"]))
        facts = bool(stored["has_targets"]), labels, notes, bool(stored["is_new"])
        if stored["sha256"] != digest_of(*facts):
            raise ValueError("its sha256 does not match its labels and notes")
        others = dict(zip(("has_targets", "labels", "notes", "is_new"), facts, strict=True)) | {
            "sha256": stored["sha256"]
        }
        return super().parse(stored) | parts | others

    def files(self) -> Iterator[tuple[Shard, int]]:
        yield from super().files()
        for shard in self.train_examples.shards + self.validation_examples.shards:
            yield shard, 8


@dataclass(frozen=True)
class ExampleCacheEntry:
    """An intact entry of the cache: every byte as it was written."""

    folder: Path
    index: ExampleIndex
    train: ExampleStore
    validation: ExampleStore

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer, *, verify: bool = False) -> Self:
        """Open and check the entry ``folder``.  Raises ValueError, naming the file, if it is missing or damaged."""
        index = ExampleIndex.read(folder)

        def check(shards: Sequence[Shard], dtype: str) -> list[TokenSlice]:
            files = [TokenFile(folder / shard.name, dtype, 0, index.tokenizer, shard.sha256) for shard in shards]
            return open_checked(files, 1 << 63, folder.parent, verify=verify)  # the cache key holds the tokenizer

        def stored(part: SplitShards, examples: SplitShards) -> ExampleStore:
            numbers = np.concatenate([np.empty(0, "<i8"), *map(_read, check(examples.shards, "<i8"))]).reshape(-1, 2)
            shards = check(part.shards, index.dtype)
            return ExampleStore(shards, numbers[:, 0].copy(), numbers[:, 1].copy(), index.has_targets)

        return cls(
            folder, index, stored(index.train, index.train_examples),
            stored(index.validation, index.validation_examples),
        )  # fmt: skip


def _read(tokens: TokenSlice) -> np.ndarray:
    out = np.empty(len(tokens), tokens.dtype)
    tokens.read(0, out)
    return out
