"""Which examples train and which validate, by what is in them."""

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np


def content_hash(parts: Iterable[str]) -> int:
    """63 bits of a hash of texts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(digest.digest(), "little") >> 1


def to_column(values: array) -> np.ndarray:
    """A growing array as one of NumPy's, int64."""
    return np.frombuffer(values, np.int64) if len(values) else np.empty(0, np.int64)


def set_aside(hashes: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each example validates: ``fraction`` of each label's, as near as may be; bool.

    Which ones follows from ``hashes`` of their content alone, so that the order of the examples does not matter and
    those of equal content are always on the same side.  A label never goes to validation as a whole.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    of_label = labels[first]
    by_label = np.lexsort((unique, of_label))  # one label after the other, within it as the hashes fall
    numbers = np.arange(len(unique))
    is_chosen = np.floor((numbers + 1) * fraction) > np.floor(numbers * fraction)
    begins = np.flatnonzero(np.diff(of_label[by_label], prepend=-1, append=-1)) if len(unique) else numbers
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        if is_chosen[begin:end].all():
            is_chosen[begin] = False
    validates = np.empty(len(unique), bool)
    validates[by_label] = is_chosen
    return validates[inverse]


def undersample(hashes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether to keep each example, so that there are as many of each label as of the rarest; bool.

    Which ones follows from their content, and for those of equal content from their order.
    """
    by_label = np.lexsort((np.arange(len(hashes)), hashes, labels))
    _, begins, counts = np.unique(labels[by_label], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(begins, counts)  # within the label
    keep = np.empty(len(labels), bool)
    keep[by_label] = rank < counts.min(initial=len(labels))
    return keep
