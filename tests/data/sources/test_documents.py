"""Reading and cutting text: what goes in comes out, exactly, or an error names the file and the byte."""

import bz2
import gzip
import lzma
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from llmtrain.data.sources import documents
from llmtrain.data.sources.documents import DocumentPiece, read_text, split_documents
from llmtrain.tokenizer import Tokenizer
from llmtrain.tokenizer.bpe import END_OF_TEXT, PATTERNS
from llmtrain.tokenizer.gpt2 import RANKS
from llmtrain.tokenizer.tiktoken import Tiktoken

TEXT = "Grüße, 世界! 🙂\r\n\tand the rest.\n" * 50


def in_blocks(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def join(pieces: Iterator[DocumentPiece]) -> list[str]:
    whole = [""]
    for piece in pieces:
        whole[-1] += piece.text
        if piece.ends_document:
            whole.append("")
    assert whole.pop() == ""  # the last piece ends a document
    return whole


# --- reading -----------------------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def gz(data: bytes) -> bytes:
    """Without the time, which would be in the names of the tests, and another one in each of their processes."""
    return gzip.compress(data, mtime=0)


COMPRESS = {".txt": bytes, ".gz": gz, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_text_is_read_unchanged_across_blocks_and_compressions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, block: int
) -> None:
    monkeypatch.setattr(documents, "BLOCK", block)
    monkeypatch.setattr(documents, "COMPRESSED_BLOCK", block)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT.encode()))
    assert "".join(read_text(path)) == TEXT


@pytest.mark.parametrize("compress", [gz, zstd])
def test_compressed_files_of_several_members(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("a.gz" if compress is gz else "a.zst")
    path.write_bytes(compress(b"one ") + compress(b"two ") + compress(b"three"))
    assert "".join(read_text(path)) == "one two three"


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_file_that_expands_a_thousand_times_is_read_in_small_blocks(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](b"a" * (1 << 26)))
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    try:
        assert sum(map(len, read_text(path))) == 1 << 26
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_the_memory_that_a_small_file_may_ask_for_is_limited(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    ).compressobj()
    (tmp_path / "a.zst").write_bytes(frame.compress(b"text") + frame.flush())
    with pytest.raises(ValueError, match=r"a\.zst: damaged or cut: .*too much memory"):
        list(read_text(tmp_path / "a.zst"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffa\ufeffb", encoding="utf-8")
    assert "".join(read_text(path)) == "a\ufeffb"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\0def", "byte 3 is NUL: a binary file"),
        ("a.txt", "a".encode("utf-16-le"), "byte 1 is NUL"),
        ("a.txt", b"x" * 20 + b"\xe9t\xe9", "byte 20 is not UTF-8"),
        ("a.txt", "x" * 9 + "é", "byte 9 is not UTF-8 .unexpected end"),
        ("a.gz", gz(TEXT.encode())[:-20], "damaged or cut"),
        ("a.gz", b"no gzip", "damaged or cut: Not a gzipped file"),
        ("a.gz", gz(b"x" * 9 + b"\xff"), "byte 9 is not UTF-8"),
        ("a.zst", zstd(TEXT.encode())[:-9], "damaged or cut: the last frame has no end"),
        ("a.zst", b"no zstd", "damaged or cut"),
    ],
)
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_a_file_that_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | str, message: str, block: int
) -> None:
    monkeypatch.setattr(documents, "BLOCK", block)
    path = tmp_path / name
    path.write_bytes(content.encode()[:-1] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        list(read_text(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: No such file or directory"):
        list(read_text(tmp_path / "nowhere"))


# --- documents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("one", "", ["one"]),
        ("one<|x|>two", "<|x|>", ["one", "two"]),
        ("one<|x|>two", "", ["one<|x|>two"]),
        ("<|x|>one\n<|x|>\n<|x|><|x|>\ntwo<|x|>\n", "<|x|>", ["one\n", "\ntwo"]),  # blank documents are none
        (" \n", "<|x|>", []),
        ("", "", []),
        ("a<|x|", "<|x|>", ["a<|x|"]),
    ],
)
@pytest.mark.parametrize("block", [1, 3, 100])
def test_documents_are_split_at_separators(text: str, separator: str, expected: list[str], block: int) -> None:
    assert join(split_documents(in_blocks(text, block), separator)) == expected


def test_separators_are_found_wherever_pieces_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for _ in range(300):
        monkeypatch.setattr(documents, "PIECE", rng.randint(1, 20))
        monkeypatch.setattr(documents, "LONGEST_PIECE", rng.randint(20, 60))
        text = "".join(rng.choice(["a", "word ", "END", " OF", "END OF", "END OF DOC", "\n", "é. "]) for _ in range(60))
        expected = [part for part in text.split("END OF DOC") if part.strip()]
        assert join(split_documents(in_blocks(text, rng.randint(1, 30)), "END OF DOC")) == expected


def test_pieces_of_documents_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 100)
    monkeypatch.setattr(documents, "LONGEST_PIECE", 400)
    words = [len(piece.text) for piece in split_documents(in_blocks("some words " * 500, 50), "")]
    assert max(words) <= 150
    for block in (7, 50, 5000):
        solid = [len(piece.text) for piece in split_documents(in_blocks("x" * 5000, block), "")]
        assert solid == [400] * 12 + [200]  # the same for any blocks


WORDS = "the The 123 4567 été Ñ 世界 日本語 русский ﬁ ǅ ² Ⅷ e\u0301 \u0301 's 'll ' ’s 'RE _ x_"
SYMBOLS = "- / // ... !? 。 、 ， 「 」 $ += 🙂 \a \u200b \ufeff"
SPACES = " |  |\n|\n\n|\r\n|\t|\v|\x1c|\u00a0|\u2003|\u2028"
FRAGMENTS = [*WORDS.split(" "), *SYMBOLS.split(" "), *SPACES.split("|")]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
def test_pieces_have_the_ids_of_the_whole(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random text of every class of characters, cut as often as it can be."""
    assert set(PATTERNS) == {"gpt2", "cl100k", "o200k"}
    tokenizer = Tiktoken(encoding=str(RANKS), pattern=pattern, end_of_text=END_OF_TEXT).build()
    rng = random.Random(1)
    cuts = [0, 0]
    for round_ in range(4000):
        # every other time only the second kind of cut is left, which real text seldom needs
        monkeypatch.setattr(documents, "CUTS", CUTS[round_ % 2 :])
        monkeypatch.setattr(documents, "PIECE", rng.randint(1, 12))
        text = "".join(rng.choice(FRAGMENTS) for _ in range(40))
        pieces = [piece.text for piece in split_documents(in_blocks(text, rng.randint(1, 9)), "")]
        cuts[round_ % 2] += max(len(pieces) - 1, 0)
        ids = [token for piece in pieces for token in tokenizer.encode(piece).tolist()]
        assert ids == (tokenizer.encode(text).tolist() if text.strip() else []), (text, pieces)
    assert min(cuts) > 5000


CUTS = documents.CUTS


def test_a_real_text_cut_in_pieces_has_the_same_ids(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    monkeypatch.setattr(documents, "PIECE", 200)
    text = "".join(topics.values())[:100_000]
    pieces = list(split_documents(in_blocks(text, 64), ""))
    assert len(pieces) > 300
    assert [i for piece in pieces for i in gpt2.encode(piece.text).tolist()] == gpt2.encode(text).tolist()
