"""The cache of token shards: written once, whole or absent, made again where it is damaged."""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.cache import Source, prepare
from llmtrain.data.documents import Piece
from llmtrain.data.index import INDEX, Index
from llmtrain.tokenizer import Tokenizer

TEXTS = [f"document {i}" for i in range(40)]


class Documents:
    """A source that counts how often it is read."""

    def __init__(self, texts: list[str], seconds: float = 0) -> None:
        self.texts, self.seconds, self.reads = texts, seconds, 0

    def source(self) -> Source:
        return Source("a test", json.dumps(self.texts), self.pieces)

    def pieces(self) -> Iterator[Piece]:
        self.reads += 1
        for text in self.texts:
            time.sleep(self.seconds)
            yield Piece(text, ends_document=True)


def decode(folder: Path, index: Index, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    train, validation = (
        tokenizer.decode([i for shard in index.open(folder, part) for i in shard.tolist()]).split("<|endoftext|>")
        for part in (index.train, index.validation)
    )
    assert train.pop() == validation.pop() == ""  # every document is ended
    return train, validation


def test_what_is_in_an_entry(tmp_path: Path, byte: Tokenizer) -> None:
    folder, index = prepare(Documents(TEXTS).source(), byte, 0.25, tmp_path, shard_tokens=100)
    assert decode(folder, index, byte) == ([t for i, t in enumerate(TEXTS) if i % 4 != 3], TEXTS[3::4])
    assert (index.train.documents, index.validation.documents) == (30, 10)
    assert (index.dtype, index.tokenizer) == ("<u2", byte.fingerprint)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [INDEX, *(f"train-{i:05d}.bin" for i in range(4)), *(f"validation-{i:05d}.bin" for i in range(2))]
    assert [shard.tokens for shard in index.train.shards] == [100, 100, 100, index.train.tokens - 300]
    for shard in index.train.shards + index.validation.shards:
        raw = (folder / shard.name).read_bytes()
        assert len(raw) == 2 * shard.tokens
        assert hashlib.sha256(raw).hexdigest() == shard.sha256
    assert Index.read(folder) == index


def test_large_vocabularies_take_32_bits(tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte, "vocab_size", 100_000)
    folder, index = prepare(Documents(TEXTS).source(), byte, 0.25, tmp_path)
    assert index.dtype == "<u4"
    assert decode(folder, index, byte)[1] == TEXTS[3::4]


def test_an_entry_is_found_again(tmp_path: Path, byte: Tokenizer, gpt2: Tokenizer) -> None:
    documents = Documents(TEXTS)
    first = prepare(documents.source(), byte, 0.1, tmp_path)
    assert prepare(documents.source(), byte, 0.1, tmp_path) == first
    assert documents.reads == 1
    others = [
        prepare(documents.source(), byte, 0.2, tmp_path),
        prepare(documents.source(), gpt2, 0.1, tmp_path),
        prepare(Documents([*TEXTS, "one more"]).source(), byte, 0.1, tmp_path),
    ]
    assert len({folder for folder, _ in [first, *others]}) == 4


def test_too_few_documents_leave_validation_empty(tmp_path: Path, byte: Tokenizer) -> None:
    _, index = prepare(Documents(TEXTS[:9]).source(), byte, 0.1, tmp_path)
    assert (index.train.documents, index.validation.documents, index.validation.shards) == (9, 0, [])


@pytest.mark.parametrize("damage", ["cut", "gone", "no index", "other format", "no json", "no key"])
def test_damaged_entries_are_made_again(
    tmp_path: Path, byte: Tokenizer, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    documents = Documents(TEXTS)
    folder, index = prepare(documents.source(), byte, 0.1, tmp_path)
    shard, stored = folder / "train-00000.bin", folder / INDEX
    match damage:
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-2])
        case "gone":
            shard.unlink()
        case "no index":
            stored.unlink()
        case "other format":
            stored.write_text(stored.read_text().replace('"format": 1', '"format": 99'))
        case "no json":
            stored.write_text("{")
        case "no key":
            stored.write_text('{"format": 1}')
    with caplog.at_level(logging.WARNING):
        assert prepare(documents.source(), byte, 0.1, tmp_path) == (folder, index)
    assert documents.reads == 2
    assert str(shard if damage in ("cut", "gone") else stored) in caplog.text
    assert "tokenised again" in caplog.text
    assert decode(folder, index, byte)[1] == TEXTS[9::10]


def test_nothing_remains_of_a_failure(tmp_path: Path, byte: Tokenizer) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece("some text", ends_document=True)
        raise ValueError("a.txt: byte 7 is not UTF-8")

    with pytest.raises(ValueError, match=r"a\.txt: byte 7"):
        prepare(Source("a test", "x", pieces), byte, 0, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_no_text(tmp_path: Path, byte: Tokenizer) -> None:
    with pytest.raises(ValueError, match="a test: there is no text in it"):
        prepare(Documents([]).source(), byte, 0.1, tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*file: .*; name a writable place with room"):
        prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path / "file")


def test_a_full_disk(tmp_path: Path, byte: Tokenizer) -> None:
    """In a process of its own, whose files may not grow past 4 KB."""
    script = f"""
import resource, signal
from pathlib import Path
from llmtrain.data.cache import Source, prepare
from llmtrain.data.documents import Piece
from llmtrain.tokenizer.byte import Byte
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    prepare(Source("a test", "x", lambda: iter([Piece("x" * 9999, True)])), Byte().build(), 0, Path({str(tmp_path)!r}))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"data.cache_dir={tmp_path}: File too large; name a writable place with room")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_cache_that_can_only_be_read_serves_what_it_has(tmp_path: Path, byte: Tokenizer) -> None:
    folder, index = prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path)
    for lock in tmp_path.glob("*.lock"):  # a found entry takes no lock, writes nothing
        lock.unlink()
    assert prepare(Documents(TEXTS).source(), byte, 0.1, tmp_path) == (folder, index)
    assert not list(tmp_path.glob("*.lock"))


def test_several_at_once_do_the_work_once(tmp_path: Path, byte: Tokenizer) -> None:
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
    assert all(result == results[0] for result in results)


def test_a_killed_writer_is_waited_for_and_swept_away(tmp_path: Path, byte: Tokenizer) -> None:
    script = f"""
import time
from pathlib import Path
from llmtrain.data.cache import Source, prepare
from llmtrain.data.documents import Piece
from llmtrain.tokenizer.byte import Byte
def pieces():
    yield Piece("x" * (1 << 21), True)
    print("writing", flush=True)
    time.sleep(60)
prepare(Source("a test", {json.dumps(TEXTS)!r}, pieces), Byte().build(), 0.1, Path({str(tmp_path)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        (left,) = tmp_path.glob(".tmp-*")
        shutil.copytree(left, tmp_path / ".tmp-another")  # left by one that died long ago
        documents, results = Documents(TEXTS), []
        thread = threading.Thread(target=lambda: results.append(prepare(documents.source(), byte, 0.1, tmp_path)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert documents.reads == 0
        assert left.exists()
        writer.kill()
        thread.join(30)
    folder, index = results[0]
    assert decode(folder, index, byte)[1] == TEXTS[9::10]
    assert not list(tmp_path.glob(".tmp-*"))


def test_sequences_of_shards_are_those_of_the_whole(tmp_path: Path, byte: Tokenizer) -> None:
    small, few = (prepare(Documents(TEXTS).source(), byte, 0, tmp_path / str(n), shard_tokens=n) for n in (7, 10**6))
    ids = [np.concatenate(index.open(folder, index.train)) for folder, index in (small, few)]
    np.testing.assert_array_equal(ids[0], ids[1])
