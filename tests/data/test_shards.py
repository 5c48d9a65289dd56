"""Prepared token files: every layout reads as what was written, and what is wrong is found before training."""

import hashlib
import os
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data import Corpus
from llmtrain.data.cache.id_width import TokenType
from llmtrain.data.cache.token_cache import DocumentSource, prepare
from llmtrain.data.cache.token_file import TokenFileFormat
from llmtrain.data.cache.token_reader import BLOCK
from llmtrain.data.shards import Shards
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.data.sources.files import read_memo
from llmtrain.tokenizer import Tokenizer
from llmtrain.tokenizer.byte import Byte
from tests.data.harm import flip, flip_unnoticed

IDS = np.arange(101) % 257


def nanogpt(ids: np.ndarray) -> bytes:
    return ids.astype("<u2").tobytes()


def llmc(
    ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2", tokens: int | None = None
) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if tokens is None else tokens
    return header.tobytes() + ids.astype(dtype).tobytes()


def llama3(ids: np.ndarray) -> bytes:
    return llmc(ids, 20240801, 7, "<u4")


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    return {
        "validation_path": None,
        "format": TokenFileFormat.auto,
        "sequence_length": 10,
        "validation_fraction": 0.0,
        "shuffle": True,
        "cache_dir": str(tmp_path / "cache"),
    }


@pytest.fixture
def ours(tmp_path: Path, byte: Tokenizer) -> Path:
    """Shards of this program: 40 documents of 5 tokens, 4 of them for validation, in several files."""
    pieces = [DocumentPiece(f"{i:04d}", ends_document=True) for i in range(40)]
    return prepare(
        DocumentSource("a test", "x", lambda: iter(pieces)), byte, 0.1, tmp_path / "made", shard_tokens=64
    ).folder


def build(path: Path | str, common: dict[str, Any], tokenizer: Tokenizer | None = None) -> Corpus:
    return Shards(path=str(path), **({"dtype": TokenType.auto} | common)).build(tokenizer or Byte().build())


def verify(path: Path | str, common: dict[str, Any]) -> Corpus:
    return Shards(path=str(path), **({"dtype": TokenType.auto} | common)).verify(Byte().build())


def inputs(sequences: Any) -> list[int]:
    return sequences.gather(np.arange(len(sequences)))[0].ravel().tolist()


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [nanogpt, llmc, llama3])
def test_nanogpt_and_llmc_layouts_are_read(tmp_path: Path, common: dict[str, Any], write: Any) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(write(IDS))
    explicit = TokenFileFormat.nanogpt if write is nanogpt else TokenFileFormat.llmc
    for form in (TokenFileFormat.auto, explicit):
        corpus = build(path, common | {"format": form})
        assert inputs(corpus.train) == IDS[:100].tolist()
        assert corpus.validation is None
        assert "1 file, 101 tokens" in corpus.description


def test_our_own_shards_are_read(ours: Path, common: dict[str, Any], byte: Tokenizer) -> None:
    for form in (TokenFileFormat.auto, TokenFileFormat.llmtrain):
        corpus = build(ours, common | {"format": form, "sequence_length": 5, "validation_fraction": 0.5})
        assert byte.decode(inputs(corpus.train)).startswith("0000<|endoftext|>0001<|endoftext|>")
        assert corpus.train.tokens == 36 * 5
        assert corpus.validation is not None
        assert byte.decode(inputs(corpus.validation)) == "0009<|endoftext|>0019<|endoftext|>0029<|endoftext|>"
    assert build(ours, common).validation is None  # validation_fraction=0


def test_a_nanogpt_folder_has_its_validation_file(tmp_path: Path, common: dict[str, Any]) -> None:
    (tmp_path / "train.bin").write_bytes(nanogpt(IDS))
    (tmp_path / "val.bin").write_bytes(nanogpt(IDS[50:]))
    corpus = build(tmp_path, common | {"validation_fraction": 0.1})
    assert inputs(corpus.train) == IDS[:100].tolist()
    assert corpus.validation is not None
    assert inputs(corpus.validation) == IDS[50:100].tolist()


def test_an_llmc_folder_is_read_by_pattern(tmp_path: Path, common: dict[str, Any]) -> None:
    (tmp_path / "fineweb_train_000001.bin").write_bytes(llmc(IDS[:57]))
    (tmp_path / "fineweb_train_000002.bin").write_bytes(llmc(IDS[57:]))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(llmc(IDS[:21]))
    corpus = build(tmp_path / "*.bin", common | {"validation_fraction": 0.1})
    assert inputs(corpus.train) == IDS[:100].tolist()  # a sequence runs across the files' edge
    assert corpus.validation is not None
    assert corpus.validation.tokens == 21


def test_validation_path_names_the_validation_shards(tmp_path: Path, common: dict[str, Any]) -> None:
    for name, ids in [("a.bin", IDS), ("b.bin", IDS[:41]), ("val.bin", IDS[:11])]:
        (tmp_path / name).write_bytes(nanogpt(ids))
    corpus = build(tmp_path, common | {"validation_path": str(tmp_path / "b.bin")})
    assert corpus.train.tokens == 101 + 11  # what is for validation is not trained on
    assert corpus.validation is not None
    assert corpus.validation.tokens == 41


def test_validation_fraction_takes_the_end_of_the_shards(tmp_path: Path, common: dict[str, Any]) -> None:
    path = tmp_path / "val.bin"  # a file that is named is what to train on, whatever its name
    path.write_bytes(nanogpt(IDS))
    corpus = build(path, common | {"validation_fraction": 0.2})
    assert corpus.validation is not None
    assert inputs(corpus.train) == IDS[:80].tolist()
    assert inputs(corpus.validation) == IDS[81:91].tolist()


# --- the type of raw ids ------------------------------------------------------------------------------------------

WIDE = np.random.default_rng(0).integers(0, 70_000, 20_000)  # of a vocabulary beyond 65,536
NARROW = np.random.default_rng(0).integers(0, 257, 20_000)


def sized(vocab_size: int) -> Tokenizer:
    tokenizer = Byte().build()
    tokenizer.vocab_size = vocab_size
    return tokenizer


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8"])
@pytest.mark.parametrize(("ids", "vocab_size"), [(WIDE, 70_000), (WIDE, 128_256), (NARROW, 257), (NARROW, 128_256)])
def test_wider_ids_are_recognised(
    tmp_path: Path, common: dict[str, Any], dtype: str, ids: np.ndarray, vocab_size: int
) -> None:
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    corpus = build(tmp_path / "a.bin", common, sized(vocab_size))
    assert corpus.train.tokens == 20_000
    assert inputs(corpus.train) == ids[: len(ids) - 10].tolist()


@pytest.mark.parametrize(("ids", "vocab_size"), [(NARROW, 257), (NARROW % 16, 257), (NARROW, 50_257)])
def test_16_bits_are_recognised(tmp_path: Path, common: dict[str, Any], ids: np.ndarray, vocab_size: int) -> None:
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    assert build(tmp_path / "a.bin", common, sized(vocab_size)).train.tokens == 20_000


@pytest.mark.parametrize("content", [NARROW.astype("<u2"), np.zeros(2000, "<u2"), np.array([7, 0] * 10, "<u2")])
def test_a_type_that_is_not_clear_is_refused_and_can_be_named(
    tmp_path: Path, common: dict[str, Any], content: np.ndarray
) -> None:
    content.tofile(tmp_path / "a.bin")
    with pytest.raises(
        ValueError, match=r"a\.bin: the type of its ids is not clear, .* 128,256; name it with data\.dtype"
    ):
        build(tmp_path, common, sized(128_256))
    named = build(tmp_path, common | {"dtype": TokenType.uint16}, sized(128_256))
    assert inputs(named.train)[:10] == content[:10].tolist()
    np.random.default_rng(0).integers(0, 70_000, 2000).astype("<u4").tofile(tmp_path / "b.bin")
    if not content.any():  # as the other file
        assert build(tmp_path, common, sized(128_256)).train.tokens == 1000 + 2000


def test_ids_of_a_larger_vocabulary_are_not_taken_for_narrow_ones(tmp_path: Path, common: dict[str, Any]) -> None:
    WIDE.astype("<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(
        ValueError, match=rf"token \d+ is {WIDE[WIDE >= 50_257][0]}, beyond the tokenizer's vocabulary of 50"
    ):
        build(tmp_path, common, sized(50_257))


@pytest.mark.parametrize("dtype", [">u2", ">u4"])
def test_big_endian_ids_are_refused(tmp_path: Path, common: dict[str, Any], dtype: str) -> None:
    NARROW.astype(dtype).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin: its ids are big-endian; convert them"):
        build(tmp_path, common, sized(257))


def test_negative_ids_are_refused(tmp_path: Path, common: dict[str, Any]) -> None:
    ids = NARROW.astype("<i4")
    ids[5] = -1
    ids.tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin: token 5 is 4294967295, beyond the tokenizer's vocabulary"):
        build(tmp_path, common | {"dtype": TokenType.int32}, sized(257))


def test_the_type_is_read_from_files_beside(tmp_path: Path, common: dict[str, Any]) -> None:
    """Of 8 zeros the ids tell nothing."""
    ids = np.zeros(60, "<i4")
    ids.tofile(tmp_path / "a.bin")
    (tmp_path / "meta.json").write_text('{"dtype": "int32", "vocab_size": 100000}')
    assert build(tmp_path / "a.bin", common).train.tokens == 60
    (tmp_path / "meta.json").unlink()
    head = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x05" + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    (tmp_path / "a.idx").write_bytes(head + np.array([10, 20], "<i4").tobytes() + bytes(40))
    corpus = build(tmp_path, common | {"cache_dir": str(tmp_path / ".cache")})
    assert corpus.train.tokens == 30
    assert not any(".idx" in note for note in corpus.notes)
    (tmp_path / "a.idx").write_bytes(head + np.array([10, 21], "<i4").tobytes() + bytes(40))
    with pytest.raises(ValueError, match=r"a\.bin: 240 bytes, where a\.idx says 31 ids of 8 bytes"):
        build(tmp_path, common)


# --- what is wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        (b"", TokenFileFormat.auto, "an empty file"),
        (nanogpt(IDS)[:-1], TokenFileFormat.auto, "cut or no token file: 201 bytes"),
        (
            llmc(IDS)[:-2],
            TokenFileFormat.auto,
            r"cut or damaged: 1,224 bytes, where its header says 101 tokens \(1,226 bytes\)",
        ),
        (llmc(IDS) + b"\0\0", TokenFileFormat.auto, "cut or damaged: 1,228 bytes"),
        (llama3(IDS)[:500], TokenFileFormat.auto, "cut or damaged: 500 bytes"),
        (llmc(IDS[:0]), TokenFileFormat.auto, "cut or damaged: 1,024 bytes, where its header says 0 tokens"),
        (llmc(IDS, tokens=-5), TokenFileFormat.auto, "cut or damaged"),
        (
            llmc(IDS, version=3),
            TokenFileFormat.auto,
            "magic 20240520 version 3; llm.c's are 20240520 version 1, 20240801 version 7",
        ),
        (nanogpt(IDS), TokenFileFormat.llmc, "its header has magic 65536 version 196610"),
        (nanogpt(IDS), TokenFileFormat.llmtrain, r"a\.bin: no index\.json beside it names it; take data\.format=auto"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, common: dict[str, Any], content: bytes, form: TokenFileFormat, message: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        build(path, common | {"format": form})
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("write", [nanogpt, llmc, llama3])
def test_ids_beyond_the_vocabulary_are_named_by_position(tmp_path: Path, common: dict[str, Any], write: Any) -> None:
    good, bad = tmp_path / "a.bin", tmp_path / "b.bin"
    good.write_bytes(write(IDS))
    ids = np.tile(IDS, BLOCK // 100)  # more than one block
    ids[BLOCK] = 257
    bad.write_bytes(write(ids))
    for _ in range(2):  # the second time from memory
        with pytest.raises(
            ValueError, match=rf"b\.bin: token {BLOCK:,} is 257, beyond the tokenizer's vocabulary of 257"
        ):
            build(tmp_path / "*.bin", common)


@pytest.mark.parametrize("write", [nanogpt, llmc, llama3])
def test_files_are_read_whole_once(tmp_path: Path, common: dict[str, Any], write: Any) -> None:
    """A bit that flips on the disk changes no time: a start trusts what it remembers, ``verify`` does not."""
    path = tmp_path / "a.bin"
    path.write_bytes(write(IDS))
    first = build(path, common)
    ((memo, facts),) = ((memo, read_memo(memo)[str(path)][1]) for memo in (tmp_path / "cache").glob("tokens-*.json"))
    assert facts == [hashlib.sha256(path.read_bytes()).hexdigest(), 100]  # one reading gave both
    assert verify(path, common).fingerprint == first.fingerprint
    flip_unnoticed(path, path.stat().st_size - 1, memo)
    assert build(path, common).fingerprint == first.fingerprint
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.bin: its content has changed, its size and modification time have n"):
            verify(path, common)
    os.utime(path, ns=(0, 0))  # the change is meant
    with pytest.raises(ValueError, match=r"a\.bin: token 100 is"):
        verify(path, common)


def test_a_changed_byte_anywhere_changes_the_fingerprint(tmp_path: Path, common: dict[str, Any]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(nanogpt(np.tile(IDS, 30_000)))
    before = build(path, common).fingerprint
    flip(path, 3_000_000)
    after = build(path, common).fingerprint
    assert after != before
    flip(path, 3_000_000)
    assert build(path, common).fingerprint == before


def test_the_fingerprint_covers_content_and_order_not_names(tmp_path: Path, common: dict[str, Any]) -> None:
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(nanogpt(IDS))
    (tmp_path / "c.bin").write_bytes(nanogpt(IDS[::-1]))
    (tmp_path / "d.bin").write_bytes(llmc(IDS))
    both = str(tmp_path / "[ac].bin")
    prints = [
        build(tmp_path / "a.bin", common).fingerprint,
        build(both, common).fingerprint,
        build(both, common | {"validation_path": str(tmp_path / "c.bin")}).fingerprint,  # another split
        build(tmp_path / "d.bin", common).fingerprint,
        build(tmp_path / "d.bin", common | {"format": TokenFileFormat.nanogpt}, sized(1 << 16)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert build(tmp_path / "b.bin", common).fingerprint == prints[0]  # by content, not by name
    (tmp_path / "a.bin").rename(tmp_path / "aside")
    (tmp_path / "c.bin").rename(tmp_path / "a.bin")
    (tmp_path / "aside").rename(tmp_path / "c.bin")
    assert build(both, common).fingerprint not in prints  # exchanged


def test_an_index_of_another_program_is_refused_without_data_format(tmp_path: Path, common: dict[str, Any]) -> None:
    (tmp_path / "a.bin").write_bytes(nanogpt(IDS))
    (tmp_path / "index.json").write_text('{"chunks": []}')
    with pytest.raises(
        ValueError,
        match=r"index\.json: damaged, .*'format' is missing; .*\(if they are not llmtrain's, name their data\.format\)",
    ):
        build(tmp_path, common)
    assert build(tmp_path, common | {"format": TokenFileFormat.nanogpt}).train.tokens == 101


def test_shards_of_another_tokenizer_are_refused(ours: Path, common: dict[str, Any], gpt2: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"train-00000\.bin: made by another tokenizer"):
        build(ours, common, gpt2)


def test_shards_cut_or_missing_are_refused(ours: Path, common: dict[str, Any]) -> None:
    shard = ours / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00001\.bin: has 126 bytes, not 128; restore it from a copy or prep"):
        build(ours, common)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin: missing"):
        build(ours, common)
    shutil.rmtree(ours)
    with pytest.raises(ValueError, match=r"data\.path=.*: no such file or folder"):
        build(ours, common)


def test_shards_with_changed_content_are_refused(ours: Path, common: dict[str, Any]) -> None:
    flip(ours / "train-00001.bin", 64)
    with pytest.raises(
        ValueError,
        match=r"train-00001\.bin: its sha256 is not the one in index\.json: its content has been changed; "
        "restore it from a copy or prepare the shards again",
    ):
        build(ours, common)
    flip(ours / "train-00001.bin", 64)
    build(ours, common)  # what was remembered is not in the way


def test_exchanged_shards_are_refused(ours: Path, common: dict[str, Any]) -> None:
    build(ours, common)
    one, other = ours / "train-00000.bin", ours / "train-00001.bin"
    assert one.stat().st_size == other.stat().st_size
    for file in (one, other):
        os.utime(file, ns=(0, 0))
    build(ours, common)
    one.rename(ours / "aside")
    other.rename(one)
    (ours / "aside").rename(other)
    with pytest.raises(
        ValueError, match=r"train-00000\.bin: its sha256 .* its content is that of train-00001\.bin: shards were exch"
    ):
        build(ours, common)


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path: Path, common: dict[str, Any]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(nanogpt(np.tile(IDS, 100_000)))
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            flip(path, 0)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with pytest.raises(ValueError, match=r"a\.bin: changed while it was read; start again when it is complete"):
            build(path, common)
    finally:
        done.set()
        changing.join()


def test_more_shards_than_open_files_are_read(tmp_path: Path, common: dict[str, Any]) -> None:
    for i in range(40):
        (tmp_path / f"{i:02d}.bin").write_bytes(nanogpt(IDS))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        with pytest.raises(ValueError, match=r"\.bin: Too many open files; allow more with: ulimit -n 65536"):
            build(tmp_path, common)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_folder_without_training_tokens_is_refused(tmp_path: Path, common: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"there is no token file \(\.bin\) in this folder"):
        build(tmp_path, common)
    (tmp_path / "val.bin").write_bytes(nanogpt(IDS))
    with pytest.raises(ValueError, match="all of its files are for validation"):
        build(tmp_path, common)
    (tmp_path / "a.bin").write_bytes(nanogpt(IDS[:5]))
    with pytest.raises(ValueError, match="5 tokens for training make no sequence, which takes 11"):
        build(tmp_path / "a.bin", common)
