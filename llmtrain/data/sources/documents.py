"""Stream text files as documents: a corpus is never whole in memory, at any size of its files."""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from llmtrain.tokenizer import CUTS

PIECE = 1 << 20  # characters of a document that are encoded at once
LONGEST_PIECE = 16 * PIECE  # of a document without a place to cut
BLOCK = 1 << 20  # bytes read at once
COMPRESSED_BLOCK = 1 << 16  # small, since decompressed it can be a thousand times larger


class DocumentPiece(NamedTuple):
    """A stretch of a document, cut where tokenizers that split by words give the same ids as for the whole."""

    text: str
    ends_document: bool
    origin: str = ""  # the file or another name of the document, for messages


def split_documents(blocks: Iterable[str], separator: str, origin: str = "") -> Iterator[DocumentPiece]:
    """Cut a text, given in blocks, into documents at ``separator`` (empty: one document), and documents into pieces.

    Joined, the pieces of a document are its exact text.  Documents of white space alone are left out.
    """
    rest = ""
    is_open = False  # pieces of the current document have been yielded
    for block in blocks:
        rest += block
        *documents, rest = rest.split(separator) if separator else [rest]
        for document in documents:
            if is_open or not _is_blank(document):
                yield DocumentPiece(document, True, origin)
            is_open = False
        while cut := _find_cut(rest, len(separator)):
            yield DocumentPiece(rest[:cut], False, origin)
            rest = rest[cut:]
            is_open = True
    if is_open or not _is_blank(rest):
        yield DocumentPiece(rest, True, origin)


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _find_cut(text: str, separator_length: int) -> int:
    """The place to cut ``text`` if it is long enough for a piece, else 0.

    A possible beginning of a separator stays with the rest.
    """
    if len(text) < PIECE:
        return 0
    end = len(text) - max(separator_length - 1, 0)
    for pattern in CUTS:
        if match := pattern.match(text, 0, end):
            return match.end()
    return end if len(text) >= LONGEST_PIECE else 0


def read_text(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in blocks, decompressed if its name ends in ``.gz`` or ``.zst``.

    Raises ValueError, naming the file, if it is missing, unreadable, damaged, binary or not UTF-8 (with the offset
    of the byte in the decompressed file).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    for block in _read_bytes(path):
        if (nul := block.find(0)) >= 0:
            raise ValueError(f"{path}: byte {position + nul} is NUL: a binary file (or UTF-16), not UTF-8 text")
        start = position - len(decoder.getstate()[0])  # position of the bytes decoded now
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: byte {start + error.start} is not UTF-8 ({error.reason}); convert the file, for instance "
                "with iconv -t UTF-8"
            ) from error
        yield text.removeprefix("\ufeff") if position == 0 else text  # a byte order mark is not text
        position += len(block)


def _read_bytes(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks, and an empty block at its end."""
    try:
        if path.suffix == ".zst":
            yield from _read_zstd(path)
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                while block := file.read(BLOCK):
                    yield block
        yield b""
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: damaged or cut: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _read_zstd(path: Path) -> Iterator[bytes]:
    # Not stream_reader, which takes a cut file for a complete one.
    frame = None
    with path.open("rb") as file:
        while data := file.read(COMPRESSED_BLOCK):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                if block := frame.decompress(data):
                    yield block
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the last frame has no end")
