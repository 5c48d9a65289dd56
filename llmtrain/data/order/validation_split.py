"""The choice of validation examples, and the balance of labels, by a hash of each example's content."""

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
    """A growing array as a NumPy array, int64."""
    return np.frombuffer(values, np.int64) if len(values) else np.empty(0, np.int64)


def set_aside(hashes: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """Choose the examples for validation: about ``fraction`` of those of each label; bool.

    The choice depends on the ``hashes`` of their content alone, so the order of the examples does not matter, and equal
    examples are always on the same side.  At least one example of each label trains.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    of_label = labels[first]
    by_label = np.lexsort((unique, of_label))  # label by label, within it by hash
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
    """Choose the examples to keep, so that each label has as many as the rarest; bool.

    The choice depends on the content of the examples, and for equal content on their order.
    """
    by_label = np.lexsort((np.arange(len(hashes)), hashes, labels))
    _, begins, counts = np.unique(labels[by_label], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(begins, counts)  # within the label
    keep = np.empty(len(labels), bool)
    keep[by_label] = rank < counts.min(initial=len(labels))
    return keep
