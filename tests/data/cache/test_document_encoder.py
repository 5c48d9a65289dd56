"""Encoding on threads: order, split and memory."""

import gzip
import re
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data import DataError
from llmtrain.data.cache import document_encoder as module
from llmtrain.data.cache.document_encoder import dtype_of, encode_documents, is_validation
from llmtrain.data.sources.documents import DocumentPiece, read_text, split_documents
from llmtrain.tokenizer import CUTS, Tokenizer
from llmtrain.tokenizer.byte import ByteTokenizer


def test_ids_take_16_bits_up_to_a_vocabulary_of_65536() -> None:
    assert [dtype_of(n).str for n in (257, 65536, 65537)] == ["<u2", "<u2", "<u4"]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_validation_documents_are_evenly_spread(fraction: float) -> None:
    chosen = [i for i in range(10_000) if is_validation(i, fraction)]
    assert len(chosen) == int(10_000 * fraction)
    assert 0 not in chosen
    if len(chosen) > 1:
        assert np.diff(chosen).max() - np.diff(chosen).min() <= 1


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_documents_keep_their_order_in_both_parts(
    byte: Tokenizer, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    monkeypatch.setattr(module, "PIECE", 50)
    documents = [f"document {i} " + "x" * (i % 90) for i in range(200)]
    pieces = [DocumentPiece(part, ends) for text in documents for part, ends in ((text[:9], False), (text[9:], True))]
    found: dict[bool, list[int]] = {False: [], True: []}
    counts = {False: 0, True: 0}
    for encoded in encode_documents(pieces, byte, 0.25, num_threads=num_threads):
        assert encoded.ids.dtype == np.dtype("<u2")
        found[encoded.is_validation] += encoded.ids.tolist()
        counts[encoded.is_validation] += encoded.documents
    for part in (False, True):
        expected = [text for i, text in enumerate(documents) if (i % 4 == 3) == part]
        assert byte.decode(found[part]) == "".join(text + "<|endoftext|>" for text in expected)
        assert counts[part] == len(expected)


class Broken(ByteTokenizer):
    """Fails at a text that says how."""

    def encode(self, text: str) -> np.ndarray:
        match text:
            case "no memory":
                raise MemoryError
            case "panic":
                raise Panic("index out of bounds")
            case "beyond":
                return np.array([65, 300], np.uint32)
        return super().encode(text)


class Panic(BaseException):
    """As native code raises it through pyo3: no Exception."""


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("no memory", DataError, "MemoryError"),
        ("panic", DataError, "Panic: index out of bounds"),
        ("beyond", ValueError, "model.vocab_size=257: the token '.*' has the id 300, for which the model has no row.*"),
        ("a\ud800", DataError, "UnicodeEncodeError: 'utf-8' codec can't encode character .* surrogates not allowed"),
    ],
)
def test_a_document_that_cannot_be_encoded_is_named(text: str, kind: type[Exception], message: str) -> None:
    documents = [
        DocumentPiece("good", True, "a.txt"),
        DocumentPiece("so far ", False, "b.txt"),
        DocumentPiece(text, True, "b.txt"),
    ]
    with pytest.raises(kind, match=rf"^document 2 \(b\.txt\) cannot be encoded: {message}$"):
        list(encode_documents([*documents, *documents], Broken(), 0.5))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_encoding_a_large_document_takes_bounded_memory(byte: Tokenizer, tmp_path: Path) -> None:
    """One document, far larger than what is in memory at a time: 4 jobs of 1 MB of text and 7 MB of ids each."""
    path = tmp_path / "large.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(96):
            file.write(b"0123456 " * (1 << 17))
    tracemalloc.start()
    try:
        tokens = sum(
            len(encoded.ids)
            for encoded in encode_documents(split_documents(read_text(path), "<|x|>"), byte, 0.1, num_threads=2)
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tokens == 96 * (1 << 20) + 1
    assert peak < 40 << 20


# --- documents that are encoded whole ----------------------------------------------------------------------------


class Spaced(ByteTokenizer):
    """Begins a text with a space, as SentencePiece does."""

    def encode(self, text: str) -> np.ndarray:
        return super().encode(f" {text}")

    def encode_continuation(self, text: str) -> np.ndarray:
        return super().encode(text)


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        (CUTS, ["one", " two", ".three", "x", "four"]),
        (CUTS[:1], ["one", " two.threex", "four"]),
        ((), ["one two.threex", "four"]),
    ],
)
def test_a_cut_that_would_change_ids_is_undone(
    monkeypatch: pytest.MonkeyPatch, cuts: list[re.Pattern[str]], expected: list[str]
) -> None:
    pieces = [DocumentPiece(text, text in ("x", "four")) for text in ("one", " two", ".three", "x", "four")]
    tokenizer = Spaced()
    tokenizer.cuts = cuts
    assert [stretch.text for stretch in module._rejoin(pieces, tokenizer)] == expected
    (encoded,) = encode_documents(pieces, tokenizer, 0, num_threads=1)
    assert tokenizer.decode(encoded.ids) == " one two.threex<|endoftext|> four<|endoftext|>"
    assert encoded.documents == 2


def test_pieces_encoded_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WHOLE", 10)
    tokenizer = Spaced()
    tokenizer.cuts = ()
    pieces = [DocumentPiece("abc ", False)] * 9 + [DocumentPiece("end", True)]
    stretches = list(module._rejoin(pieces, tokenizer))
    assert [len(stretch.text) for stretch in stretches] == [12, 12, 12, 3]
    assert [(stretch.starts_document, stretch.ends_document) for stretch in stretches] == [
        (True, False), (False, False), (False, False), (False, True),
    ]  # fmt: skip
