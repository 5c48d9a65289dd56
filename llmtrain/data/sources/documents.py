"""Stream text files as documents: a corpus is never whole in memory, whatever its files hold."""

import bz2
import codecs
import gzip
import lzma
import stat
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from llmtrain.tokenizer import CUTS

PIECE = 1 << 20  # characters of a document that are encoded at once
LONGEST_PIECE = 2 * PIECE  # of a document without a place to cut
BLOCK = 1 << 20  # bytes read at once
SAMPLES, SAMPLE = 16, 1 << 14  # places of a large file that are looked at, and bytes of each
FIRST_BLOCKS = 2  # that are looked at
COMPRESSED_BLOCK = 1 << 9  # bytes of zstd decompressed at once: four of them can stand for 128 KB
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# A zstd file is read with a window, kept in memory, that suits its size: a small file has no use for a large one.
SMALLEST_WINDOW, LARGEST_WINDOW = 1 << 27, 1 << 31
WINDOW_PER_BYTE = 64
BINARY = "binary, not text"
OTHER_ENCODING = "neither UTF-8 nor UTF-16 text"
XZ_MEMORY = 1 << 28  # bytes; xz -9 needs a quarter of it
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of a UTF-8 character, after its first
# The encodings that a file's first bytes name; those of four bytes first, since one of them begins like one of two.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class NotText(ValueError):
    """A file that is binary, or in an encoding that is not known."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason  # in words that are the same for many files


class DocumentPiece(NamedTuple):
    """A stretch of a document, cut where tokenizers that split by words give the same ids as for the whole."""

    text: str
    ends_document: bool
    origin: str = ""  # the file or another name of the document, for messages
    source: str = ""  # the file that holds the document; "": the origin is


def split_documents(blocks: Iterable[str], separator: str, origin: str = "") -> Iterator[DocumentPiece]:
    """Cut a text, given in blocks, into documents at ``separator`` (empty: one document), and documents into pieces.

    Joined, the pieces of a document are its exact text.  Documents of white space alone are left out.
    """
    rest = ""
    is_open = False  # pieces of the current document have been yielded
    searched = 0  # characters of the rest among which there is no place to cut
    for block in blocks:
        rest += block
        *documents, rest = rest.split(separator) if separator else [rest]
        for document in documents:
            if is_open or not _is_blank(document):
                yield DocumentPiece(document, True, origin)
            is_open, searched = False, 0
        while len(rest) >= PIECE:
            end = len(rest) - max(len(separator) - 1, 0)  # a possible beginning of a separator stays with the rest
            cut = _find_cut(rest, max(searched - 1, 0), end)
            if not cut:
                searched = end
                if end < LONGEST_PIECE:
                    break
                cut = LONGEST_PIECE
            yield DocumentPiece(rest[:cut], False, origin)
            rest, is_open, searched = rest[cut:], True, max(searched - cut, 0)
    if is_open or not _is_blank(rest):
        yield DocumentPiece(rest, True, origin)


def cut_document(text: str, origin: str = "", source: str = "") -> Iterator[DocumentPiece]:
    """One document, whole in memory, as pieces; none if it is white space alone."""
    if len(text) <= PIECE:
        if not _is_blank(text):
            yield DocumentPiece(text, True, origin, source)
        return
    blocks = (text[begin : begin + PIECE] for begin in range(0, len(text), PIECE))
    for piece in split_documents(blocks, "", origin):
        yield piece._replace(source=source)


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _find_cut(text: str, begin: int, end: int) -> int:
    """The last place between ``begin`` and ``end`` where ``text`` may be cut; 0 if there is none."""
    for pattern in CUTS:
        if match := pattern.match(text, begin, end):
            return match.end()
    return 0


def read_text(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in blocks, decompressed if its name ends in one of ``COMPRESSIONS``.

    A file that begins with the byte order mark of UTF-16 or UTF-32 is decoded as such.  Raises ValueError, naming the
    file, if it is missing, unreadable or damaged, and :class:`NotText` if it is binary or in another encoding (with the
    offset of the byte in the decompressed file).
    """
    blocks = _read_bytes(path)
    block = next(blocks)
    while block and len(block) < 4 and (more := next(blocks)):  # enough for a byte order mark
        block += more
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if block.startswith(mark)), "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    position = 0
    while True:
        if encoding == "utf-8" and (nul := block.find(0)) >= 0:
            raise NotText(
                f"{path}: byte {position + nul} is NUL: a binary file (or UTF-16), not UTF-8 text; name a file of "
                "text, or convert it, for instance with iconv -f UTF-16 -t UTF-8", BINARY,
            )  # fmt: skip
        start = position - len(decoder.getstate()[0])  # position of the bytes decoded now
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise NotText(
                f"{path}: byte {start + error.start} is not {encoding.upper()} ({error.reason}); convert the file, for "
                "instance with iconv -t UTF-8", OTHER_ENCODING,
            ) from error  # fmt: skip
        if encoding != "utf-8" and "\0" in text:
            message = f"{path}: a NUL character before byte {position + len(block)}: a binary file; name a file of text"
            raise NotText(message, BINARY)
        yield text.removeprefix("\ufeff") if position == 0 else text  # a byte order mark is not text
        if not block:
            return
        position += len(block)
        block = next(blocks, b"")


def sample_text(path: Path) -> None:
    """Raise as :func:`read_text` for what the beginning of a file shows, and places all over a large one."""
    for _ in islice(read_text(path), FIRST_BLOCKS):
        pass
    if path.suffix.lower() in COMPRESSIONS or (size := path.stat().st_size) <= FIRST_BLOCKS * BLOCK:
        return
    with path.open("rb") as file:
        if file.read(4).startswith(tuple(BYTE_ORDER_MARKS)):
            return
        for place in range(FIRST_BLOCKS * BLOCK, size - SAMPLE, max((size - FIRST_BLOCKS * BLOCK) // SAMPLES, 1)):
            file.seek(place)
            sample = file.read(SAMPLE)
            if 0 in sample:
                raise NotText(f"{path}: NUL after byte {place}", BINARY)
            try:  # without the rest of a character that has begun before, and with one that ends after it
                codecs.getincrementaldecoder("utf-8")().decode(sample.lstrip(CONTINUATION_BYTES))
            except UnicodeDecodeError as error:
                raise NotText(f"{path}: not UTF-8 after byte {place}", OTHER_ENCODING) from error


def _read_bytes(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks, and an empty block at its end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path}: not a regular file; save the text in one")
        if path.suffix.lower() == ".zst":
            yield from _read_zstd(path)
        elif path.suffix.lower() == ".xz":
            yield from _read_xz(path)
        else:
            with _open(path) as file:
                while block := file.read(BLOCK):
                    yield block
        yield b""
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: damaged or cut: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or f'damaged or cut: {error}'}") from error


def _open(path: Path) -> BinaryIO | gzip.GzipFile | bz2.BZ2File:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
    return path.open("rb")


def _read_xz(path: Path) -> Iterator[bytes]:
    # Not lzma.open, which sets no limit to the memory that a file asks for.
    stream, data = None, b""
    with path.open("rb") as file:
        while True:
            if stream is None:
                data = data or file.read(BLOCK)
                if not data:
                    return
                stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            if block := stream.decompress(data, BLOCK):
                yield block
            data = b""
            if stream.eof:
                data, stream = stream.unused_data, None
            elif stream.needs_input and not (data := file.read(BLOCK)):
                raise EOFError("the last stream has no end")


def _read_zstd(path: Path) -> Iterator[bytes]:
    # Not stream_reader, which takes a cut file for a complete one.
    frame = None
    window = min(max(SMALLEST_WINDOW, path.stat().st_size * WINDOW_PER_BYTE), LARGEST_WINDOW)
    blocks: list[bytes] = []
    size = 0
    with path.open("rb") as file:
        while data := file.read(COMPRESSED_BLOCK):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
                block = frame.decompress(data)
                blocks.append(block)
                size += len(block)
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                if size >= BLOCK:
                    yield b"".join(blocks)
                    blocks, size = [], 0
    if size:
        yield b"".join(blocks)
    if frame:
        raise EOFError("the last frame has no end")
