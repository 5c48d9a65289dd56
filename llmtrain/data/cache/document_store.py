"""Encoded documents in one file, until it is decided which of them validate."""

import os
from array import array
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from llmtrain.base.format import percent
from llmtrain.data.cache.document_encoder import EncodedText
from llmtrain.data.cache.shard_index import ShardWriter
from llmtrain.data.order.document_split import split_documents
from llmtrain.data.order.validation_split import to_column
from llmtrain.tokenizer import Tokenizer

NAME = "documents.tmp"
BLOCK = 1 << 20  # tokens copied at once
REACH = 2048  # tokens on either side of a cut, in which a better place is looked for
NAMES = 6  # of files, in a message


class DocumentStore:
    """The ids of documents, one after the other, in a file of ``folder``, and the facts that decide about them.

    Memory grows with the number of documents (20 bytes each), not with that of their tokens.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = folder / NAME, dtype
        self._file = self.path.open("x+b")
        self._lengths, self._hashes, self._sources = array("q"), array("q"), array("l")
        self._numbers: dict[str, int] = {}  # of the sources
        self._digest, self._length = blake2b(digest_size=8), 0  # of the document that has begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def append(self, encoded: EncodedText) -> None:
        self._file.write(encoded.ids.data)
        begin = 0
        for end, source in encoded.ends:
            self._add(encoded.ids[begin:end])
            self._lengths.append(self._length)
            self._hashes.append(int.from_bytes(self._digest.digest(), "little") >> 1)
            self._sources.append(self._numbers.setdefault(source, len(self._numbers)))
            self._digest, self._length, begin = blake2b(digest_size=8), 0, end
        self._add(encoded.ids[begin:])

    def _add(self, ids: np.ndarray) -> None:
        self._digest.update(ids.data)
        self._length += len(ids)

    def distribute(self, train: ShardWriter, validation: ShardWriter, fraction: float, tokenizer: Tokenizer) -> str:
        """Write every document to one of the two, or a part to each; describe what validates in a line."""
        lengths, sources = to_column(self._lengths), np.frombuffer(self._sources, "l")
        held_out = split_documents(lengths, to_column(self._hashes), sources, fraction)
        ends = np.cumsum(lengths)
        for document in np.flatnonzero((held_out > 0) & (held_out < lengths)).tolist():
            held_out[document] = self._better_cut(int(ends[document]), int(held_out[document]), tokenizer)
        end_of_text = np.array([tokenizer.end_of_text], self.dtype)
        begin = 0
        # Neighbours that go to the same place are copied together.
        kinds = np.where(held_out == 0, 0, np.where(held_out == lengths, 1, 2))
        edges = np.flatnonzero(np.diff(kinds, prepend=-1) | (kinds == 2))
        for first, after in zip(edges.tolist(), [*edges.tolist()[1:], len(kinds)], strict=True):
            end = int(ends[after - 1])
            if kinds[first] == 2:
                cut = end - int(held_out[first])
                self._copy(begin, cut, train, 1)
                train.write(end_of_text, 0)
                self._copy(cut, end, validation, 0)
            else:
                self._copy(begin, end, (train, validation)[kinds[first]], after - first)
            begin = end
        return self._describe(lengths, held_out, sources)

    def _copy(self, begin: int, end: int, writer: ShardWriter, documents: int) -> None:
        for at in range(begin, end, BLOCK):
            writer.write(self._read(at, min(at + BLOCK, end)), 0)
        writer.write(np.empty(0, self.dtype), documents)

    def _read(self, begin: int, end: int) -> np.ndarray:
        self._file.seek(begin * self.dtype.itemsize)
        ids = np.fromfile(self._file, self.dtype, end - begin)
        assert len(ids) == end - begin
        return ids

    def _better_cut(self, end: int, held_out: int, tokenizer: Tokenizer) -> int:
        """The tokens to cut off a document that ends at ``end``: near ``held_out``, from a new line or word on."""
        reach = min(held_out // 16, REACH)
        begin = end - held_out - reach
        pieces = [
            tokenizer.decode_bytes([token]) for token in self._read(begin - 1, end - held_out + reach + 1).tolist()
        ]
        for is_place in (_ends_line, _ends_word, _ends_character):
            places = [at for at in range(1, len(pieces)) if is_place(pieces[at - 1], pieces[at])]
            if places:
                return held_out - (min(places, key=lambda at: abs(at - 1 - reach)) - 1 - reach)
        return held_out

    def _describe(self, lengths: np.ndarray, held_out: np.ndarray, sources: np.ndarray) -> str:
        names = _shorten(list(self._numbers))
        whole, cut = int((held_out == lengths).sum()), int(((held_out > 0) & (held_out < lengths)).sum())
        if not whole + cut:
            return ""
        of_source = np.bincount(sources, held_out, len(names))
        shares = of_source / np.bincount(sources, lengths, len(names))
        largest = np.argsort(-of_source, kind="stable")[: (of_source > 0).sum()].tolist()
        shown = ", ".join(f"{names[number]} {percent(shares[number])}" for number in largest[:NAMES])
        rest = f", … ({len(largest):,} sources)" if len(largest) > NAMES else ""
        unused = [name for name, share in zip(names, shares, strict=True) if not share] if len(names) <= NAMES else []
        nothing = f"; nothing of {', '.join(unused)}" if unused else ""
        share = percent(held_out.sum() / lengths.sum())
        if len(lengths) == 1:
            return f"{share} of the tokens: the end of {names[0]}"
        number = f"{whole:,}" if whole else f"the end of {cut:,}"
        more = f", and the end of {cut:,} more" if whole and cut else ""
        return f"{share} of the tokens: {number} of {len(lengths):,} documents{more}; from {shown}{rest}{nothing}"


def _shorten(names: list[str]) -> list[str]:
    """Paths without the folders that they share; other names as they are."""
    if not all(map(os.path.isabs, names)):
        return names
    folder = os.path.dirname(names[0]) if len(names) == 1 else os.path.commonpath(names)  # noqa: PTH120
    return [os.path.relpath(name, folder) for name in names]


def _ends_line(left: bytes, right: bytes) -> bool:
    return left.endswith(b"\n") and not right.startswith(b"\n")


def _ends_word(left: bytes, right: bytes) -> bool:
    return left[-1:].isspace() != right[:1].isspace()


def _ends_character(left: bytes, right: bytes) -> bool:
    return not 0x80 <= (right[:1] or b" ")[0] < 0xC0
