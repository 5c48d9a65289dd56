"""Reading by position gives what the files hold, or an error that names the file."""

import gc
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data import DataError
from llmtrain.data.cache.integrity import open_checked
from llmtrain.data.cache.token_file import TokenFile
from llmtrain.data.cache.token_reader import OpenFile, TokenSlice
from llmtrain.data.sequences import Shard, Stream, slice_stream


def write(folder: Path, number: int, ids: np.ndarray, offset: int) -> TokenFile:
    path = folder / f"{number}.bin"
    path.write_bytes(b"\xff" * offset + ids.tobytes())
    return TokenFile(path, ids.dtype.str, offset)


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("dtypes", [["<u2"], ["<u4"], ["<u2", "<u4"]])
@pytest.mark.parametrize("offset", [0, 1024])
def test_sequences_in_files_are_those_in_memory(tmp_path: Path, length: int, dtypes: list[str], offset: int) -> None:
    rng = np.random.default_rng(length)
    for case in range(10):
        folder = tmp_path / str(case)
        folder.mkdir()
        sizes = rng.integers(1, 40, 5)
        arrays = [rng.integers(0, 60_000, size).astype(rng.choice(dtypes)) for size in sizes]
        files = [write(folder, i, array, offset) for i, array in enumerate(arrays)]
        tokens = open_checked(files, 60_000, tmp_path / "cache")
        begin, end = int(sizes[0]) // 2, int(sizes.sum()) - 1
        streams: list[tuple[list[Shard], list[Shard]]] = [
            ([*tokens], [*arrays]),
            (slice_stream(tokens, begin, end), slice_stream(arrays, begin, end)),
        ]
        for stored, held in streams:
            one, other = Stream(stored, length), Stream(held, length)
            assert (len(one), one.tokens) == (len(other), other.tokens)
            indices = rng.integers(0, len(one), 30)
            for got, expected in zip(one.gather(indices)[:2], other.gather(indices)[:2], strict=True):
                np.testing.assert_array_equal(got, expected)
                assert got.dtype == np.int64


def test_files_are_closed_when_nobody_reads_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcd")
    gc.collect()
    before = open_descriptors()
    tokens = TokenSlice(OpenFile(tmp_path / "a", ""), np.dtype("<u2"), 0, 2)
    part = tokens[1:]
    assert len(open_descriptors()) == len(before) + 1
    del tokens
    out = np.empty(1, "<u2")
    part.read(0, out)
    assert out.tobytes() == b"cd"
    del part
    gc.collect()
    assert open_descriptors() == before


def test_a_read_error_names_file_and_byte() -> None:
    """A file that opens and then cannot be read: nothing is at address 0 of this process."""
    file = OpenFile(Path("/proc/self/mem"), "")
    with pytest.raises(DataError, match=r"^/proc/self/mem: byte 0: Input/output error$"):
        file.read(0, np.empty(4, np.uint8))


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcd")
    file = OpenFile(tmp_path / "a", "")
    with pytest.raises(DataError, match=r"/a: cut while in use: it ends before byte 6; it had 4 bytes when it was che"):
        file.read(2, np.empty(4, np.uint8))
