"""The cache of token shards: written once, whole or absent, made again where it is damaged."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.cache.shard_index import INDEX, TextIndex
from llmtrain.data.cache.token_cache import DocumentSource, TokenCacheEntry, prepare
from llmtrain.data.cache.token_reader import TokenSlice
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.tokenizer import Tokenizer
from tests.data.harm import flip_unnoticed

TEXTS = [f"document {i}" for i in range(40)]


class Documents:
    """A source that counts how often it is read."""

    def __init__(self, texts: list[str], seconds: float = 0) -> None:
        self.texts, self.seconds, self.reads = texts, seconds, 0

    def source(self) -> DocumentSource:
        return DocumentSource("a test", json.dumps(self.texts), self.pieces)

    def pieces(self) -> Iterator[DocumentPiece]:
        self.reads += 1
        for text in self.texts:
            time.sleep(self.seconds)
            yield DocumentPiece(text, ends_document=True)


def ids_of(part: list[TokenSlice]) -> list[int]:
    """All of them, in one list."""
    ids: list[int] = []
    for tokens in part:
        out = np.empty(len(tokens), tokens.dtype)
        tokens.read(0, out)
        ids += out.tolist()
    return ids


def decode(entry: TokenCacheEntry, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    train, validation = (
        tokenizer.decode(ids_of(part)).split("<|endoftext|>") for part in (entry.train, entry.validation)
    )
    assert train.pop() == validation.pop() == ""  # every document is ended
    return train, validation


def test_an_entry_holds_the_documents_of_both_parts_and_their_hashes(tmp_path: Path, byte: Tokenizer) -> None:
    entry = prepare(Documents(TEXTS).source(), byte, 0.25, tmp_path, shard_tokens=100)
    folder, index = entry.folder, entry.index
    assert decode(entry, byte) == ([t for i, t in enumerate(TEXTS) if i % 4 != 3], TEXTS[3::4])
    assert (index.train.documents, index.validation.documents) == (30, 10)
    assert (index.dtype, index.tokenizer) == ("<u2", byte.fingerprint)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [INDEX, *(f"train-{i:05d}.bin" for i in range(4)), *(f"validation-{i:05d}.bin" for i in range(2))]
    assert [shard.tokens for shard in index.train.shards] == [100, 100, 100, index.train.tokens - 300]
    for shard in index.train.shards + index.validation.shards:
        raw = (folder / shard.name).read_bytes()
        assert len(raw) == 2 * shard.tokens
        assert hashlib.sha256(raw).hexdigest() == shard.sha256
    assert TextIndex.read(folder) == index


def test_large_vocabularies_take_32_bits(tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte, "vocab_size", 100_000)
    entry = prepare(Documents(TEXTS).source(), byte, 0.25, tmp_path)
    assert entry.index.dtype == "<u4"
    assert decode(entry, byte)[1] == TEXTS[3::4]


def test_an_entry_is_found_again(tmp_path: Path, byte: Tokenizer, gpt2: Tokenizer) -> None:
    documents = Documents(TEXTS)
    first = prepare(documents.source(), byte, 0.1, tmp_path)
    assert prepare(documents.source(), byte, 0.1, tmp_path).folder == first.folder
    assert documents.reads == 1
    others = [
        prepare(documents.source(), byte, 0.2, tmp_path),
        prepare(documents.source(), gpt2, 0.1, tmp_path),
        prepare(Documents([*TEXTS, "one more"]).source(), byte, 0.1, tmp_path),
    ]
    assert len({entry.folder for entry in [first, *others]}) == 4


def test_too_few_documents_leave_validation_empty(tmp_path: Path, byte: Tokenizer) -> None:
    index = prepare(Documents(TEXTS[:9]).source(), byte, 0.1, tmp_path).index
    assert (index.train.documents, index.validation.documents, index.validation.shards) == (9, 0, [])


def damage_entry(entry: TokenCacheEntry, damage: str) -> Path:
    """Harm a file of the entry; returns which."""
    shard, other, stored = (entry.folder / name for name in ("train-00000.bin", "train-00001.bin", INDEX))
    content, text = shard.read_bytes(), stored.read_text()
    match damage:
        case "cut":
            shard.write_bytes(content[:-2])
        case "gone":
            shard.unlink()
        case "one bit":
            shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "exchanged":
            shard.rename(entry.folder / "aside")
            other.rename(shard)
            (entry.folder / "aside").rename(other)
            for file in (shard, other):  # as alike as can be
                os.utime(file, ns=(0, 0))
        case "no index":
            stored.unlink()
        case "other format":
            stored.write_text(text.replace('"format": 1', '"format": 99'))
        case "no json":
            stored.write_text("{")
        case "no text":
            stored.write_bytes(b"\xff")
        case "no key":
            stored.write_text('{"format": 1}')
        case "a list":
            stored.write_text("[]")
        case "a path":
            stored.write_text(text.replace("train-00000.bin", "../train-00000.bin"))
        case "odd numbers":
            stored.write_text(text.replace('"tokens": 100', '"tokens": "100"'))
        case "odd type":
            stored.write_text(text.replace('"<u2"', '"object"'))
    return shard if damage in ("cut", "gone", "one bit", "exchanged") else stored


SHARD_DAMAGE = {
    "cut": "has 198 bytes, not 200",
    "gone": "missing",
    "one bit": "its sha256 is not the one in index.json: its content has been changed",
    "exchanged": "its sha256 is not the one in index.json: its content is that of train-00001.bin",
}
INDEX_DAMAGE = [
    "no index",
    "other format",
    "no json",
    "no text",
    "no key",
    "a list",
    "a path",
    "odd numbers",
    "odd type",
]


@pytest.mark.parametrize("damage", [*SHARD_DAMAGE, *INDEX_DAMAGE])
def test_damaged_entries_are_made_again(
    tmp_path: Path, byte: Tokenizer, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    documents = Documents(TEXTS)
    entry = prepare(documents.source(), byte, 0.1, tmp_path, shard_tokens=100)
    harmed = damage_entry(entry, damage)
    with pytest.raises(ValueError, match=re.escape(f"{harmed}: {SHARD_DAMAGE.get(damage, '')}")) as error:
        prepare(documents.source(), byte, 0.1, tmp_path, verify=True)
    assert str(error.value).endswith(f"; remove {entry.folder}, and the next start tokenises the text again")
    assert documents.reads == 1  # what is verified is not mended
    with caplog.at_level(logging.WARNING):
        again = prepare(documents.source(), byte, 0.1, tmp_path, shard_tokens=100)
    assert again.index == entry.index
    assert documents.reads == 2
    (warning,) = [record.getMessage() for record in caplog.records if "tokenised again" in record.getMessage()]
    assert f"{harmed}: {SHARD_DAMAGE.get(damage, '')}" in warning
    assert decode(again, byte)[1] == TEXTS[9::10]


@pytest.mark.parametrize("place", [*range(0, 900, 37)])
def test_no_flipped_bit_of_the_index_goes_into_training(tmp_path: Path, byte: Tokenizer, place: int) -> None:
    entry = prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path, shard_tokens=100)
    expected = decode(entry, byte)
    stored = bytearray((entry.folder / INDEX).read_bytes())
    stored[place % len(stored)] ^= 1
    (entry.folder / INDEX).write_bytes(stored)
    assert decode(prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path), byte) == expected


def test_ids_beyond_the_vocabulary_are_damage(
    tmp_path: Path, byte: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry whose sums are right, and which another program wrote."""
    entry = prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path)
    shard = entry.folder / "train-00000.bin"
    content = shard.read_bytes()[:-2] + b"\xff\xff"
    shard.write_bytes(content)
    stored = (entry.folder / INDEX).read_text()
    (entry.folder / INDEX).write_text(
        stored.replace(entry.index.train.shards[0].sha256, hashlib.sha256(content).hexdigest())
    )
    tokens = entry.index.train.tokens
    with caplog.at_level(logging.WARNING):
        assert decode(prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path), byte)[1] == TEXTS[9::10]
    assert f"{shard}: token {tokens - 1} is 65535, beyond the tokenizer's vocabulary of 257" in caplog.text


def test_shards_are_read_whole_once(tmp_path: Path, byte: Tokenizer) -> None:
    """A bit that flips on the disk changes no time: a start trusts what it remembers, ``verify`` does not."""
    entry = prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path)
    shard = entry.folder / "train-00000.bin"
    flip_unnoticed(shard, 0, tmp_path / "tokens-u2-0.json")
    assert decode(prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path), byte)[0][0] == "eocument 0"
    message = f"{shard}: its content has changed, its size and modification time have not; restore it from a copy"
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path, verify=True)
    with pytest.raises(ValueError, match=re.escape(message)):  # nothing wrong was remembered
        prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path, verify=True)
    (tmp_path / "tokens-u2-0.json").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{shard}: its sha256 is not the one in index.json")):
        prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path, verify=True)


def test_a_failure_leaves_no_entry(tmp_path: Path, byte: Tokenizer) -> None:
    def pieces() -> Iterator[DocumentPiece]:
        yield DocumentPiece("some text", ends_document=True)
        raise ValueError("a.txt: byte 7 is not UTF-8")

    with pytest.raises(ValueError, match=r"a\.txt: byte 7"):
        prepare(DocumentSource("a test", "x", pieces), byte, 0, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_nothing_is_written_or_removed_through_links_in_the_cache(tmp_path: Path, byte: Tokenizer) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    folder = prepare(Documents(TEXTS).source(), byte, 0.1, cache).folder
    shutil.rmtree(cache)
    cache.mkdir()
    other.mkdir()
    (other / "kept").write_text("kept")
    (cache / f".tmp-{folder.name}").symlink_to(other)
    (cache / f".tmp-{'1' * 32}").symlink_to(other)
    (cache / ".tmp-mine").mkdir()  # of somebody else
    folder.symlink_to(other)
    prepare(Documents(TEXTS).source(), byte, 0.1, cache)
    assert [path.name for path in other.iterdir()] == ["kept"]
    assert not folder.is_symlink()
    assert sorted(path.name for path in cache.glob(".tmp-*")) == [".tmp-mine"]
    shutil.rmtree(folder)
    folder.with_suffix(".lock").unlink()
    folder.with_suffix(".lock").symlink_to(other / "made")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*: Too many levels of symbolic links; name"):
        prepare(Documents(TEXTS).source(), byte, 0.1, cache)
    assert [path.name for path in other.iterdir()] == ["kept"]


def test_a_source_without_text_is_refused(tmp_path: Path, byte: Tokenizer) -> None:
    with pytest.raises(ValueError, match="a test: there is no text in it"):
        prepare(Documents([]).source(), byte, 0.1, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*file: .*; name a writable place with room"):
        prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path / "file")


def test_a_full_disk_is_named_and_leaves_no_entry(tmp_path: Path, byte: Tokenizer) -> None:
    """In a process of its own, whose files may not grow past 4 KB."""
    script = f"""
import resource, signal
from pathlib import Path
from llmtrain.data.cache.token_cache import DocumentSource, prepare
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.tokenizer.byte import Byte
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    source = DocumentSource("a test", "x", lambda: iter([DocumentPiece("x" * 9999, True)]))
    prepare(source, Byte().build(), 0, Path({str(tmp_path)!r}))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"data.cache_dir={tmp_path}: File too large; name a writable place with room")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_read_only_cache_serves_its_entries(tmp_path: Path, byte: Tokenizer) -> None:
    folder = prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path).folder
    for lock in tmp_path.glob("*.lock"):  # a found entry takes no lock, writes nothing
        lock.unlink()
    assert prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path).folder == folder
    assert not list(tmp_path.glob("*.lock"))


def test_several_processes_tokenise_once(tmp_path: Path, byte: Tokenizer) -> None:
    documents = Documents(TEXTS, seconds=0.005)
    results = []

    def work() -> None:
        results.append(prepare(documents.source(), byte, 0.1, tmp_path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert documents.reads == 1
    assert len(results) == 4
    assert all(result.index == results[0].index for result in results)


def test_a_killed_writer_is_waited_for_and_swept_away(tmp_path: Path, byte: Tokenizer) -> None:
    script = f"""
import time
from pathlib import Path
from llmtrain.data.cache.token_cache import DocumentSource, prepare
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.tokenizer.byte import Byte
def pieces():
    yield DocumentPiece("x" * (1 << 21), True)
    print("writing", flush=True)
    time.sleep(60)
prepare(DocumentSource("a test", {json.dumps(TEXTS)!r}, pieces), Byte().build(), 0.1, Path({str(tmp_path)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        (left,) = tmp_path.glob(".tmp-*")
        shutil.copytree(left, tmp_path / f".tmp-{'0' * 32}")  # left by one that died long ago
        documents, results = Documents(TEXTS), []
        thread = threading.Thread(target=lambda: results.append(prepare(documents.source(), byte, 0.1, tmp_path)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert documents.reads == 0
        assert left.exists()
        writer.kill()
        thread.join(30)
    assert decode(results[0], byte)[1] == TEXTS[9::10]
    assert not list(tmp_path.glob(".tmp-*"))


def test_sequences_of_shards_are_those_of_the_whole(tmp_path: Path, byte: Tokenizer) -> None:
    small, few = (prepare(Documents(TEXTS).source(), byte, 0, tmp_path / str(n), shard_tokens=n) for n in (7, 10**6))
    assert ids_of(small.train) == ids_of(few.train)
