"""Harm done to files in tests."""

from pathlib import Path

from llmtrain.data.sources.files import read_memo, write_memo


def flip(file: Path, place: int, bit: int = 1) -> None:
    """Flip a bit of byte ``place``, in place: the same size, another time."""
    with file.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ bit]))


def flip_unnoticed(file: Path, place: int, memo: Path) -> None:
    """Flip a bit as a failing disk does: what ``memo`` knows of the file's times still holds."""
    flip(file, place)
    known = read_memo(memo)
    stat = file.stat()
    known[str(file)][0] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    write_memo(memo, known)
