"""Validation data that are in the training data as well: their loss measures what was memorised.

Stretches of the validation data are looked up in the training data by a hash of every window of as many tokens, at
any place.  The hash of a window of 2n tokens follows from those of its halves, so that all windows of a block take
log2(STRETCH) passes of NumPy; some 10 ns a token.
"""

from collections.abc import Iterator

import numpy as np

from llmtrain.base.format import count, percent
from llmtrain.base.options import option_name
from llmtrain.data import DataConfig
from llmtrain.data.sequences import Sequences, Stream
from llmtrain.lint.case import Case, Finding, error, warning

STRETCH = 64  # tokens; a power of two
STRETCHES = 1024  # of the validation data, to look up
MOST_STRETCHES = 1 << 14  # the same if only a part of the training data is searched, where few of them are found
SPACING = 1024  # tokens between these, so that most are of different documents
DISTINCT = 8  # a stretch of fewer different tokens (rulers, padding) does not tell its document
MAX_TOKENS = 1 << 25  # of the training data, to search; some 0.3 s
MAX_ROWS = 1 << 17  # the same in sequences, where these are short
BLOCK = 1 << 16  # tokens hashed at once: they stay in the processor's cache
SMALL_BLOCK = 1 << 13  # the same in a sample: small, so that a document is seldom in it as a whole or not at all
# Healthy text repeats itself: Python's library, split by document, 15% of it (code in two packages), its documentation
# 11% (sections under two names) unless they are left out.  A split that has gone wrong repeats most of it.
SHARE = 0.2
FEWEST = 4  # stretches found from which on the user is warned: fewer may be chance

MULTIPLIERS = [pow(0xD1342543DE82EF95, 2**n, 2**64) for n in range(STRETCH.bit_length() - 1)]  # odd: nothing is lost


def validation_in_training(case: Case) -> Iterator[Finding]:
    """Validation data that are training data."""
    train, validation = case.corpus.train, case.corpus.validation
    if not isinstance(validation, Stream) or not isinstance(train, Stream) or not case.evaluates:
        return  # examples are compared when they are prepared
    rows = sampled_rows(train)
    looked_through = sum(map(len, rows)) / len(train)
    whole = looked_through == 1
    wanted = stretches(validation, STRETCHES if whole else min(validation.tokens // SPACING, MOST_STRETCHES))
    if not len(wanted):
        return
    found = look_up(wanted, train, rows)
    share = number_in_all(found, looked_through) / len(wanted)
    if np.count_nonzero(found) < FEWEST or share <= SHARE:
        return
    key, setting = source(case.run.data)
    where = f"{'all' if whole else percent(looked_through) + ' of the'} {count(train.tokens)} training tokens"
    looked = f"({len(wanted):,} stretches of {STRETCH} tokens were looked for in {where})"
    if whole and found.all():
        yield error(
            key,
            f"{setting}: the validation data are in the training data from beginning to end {looked}: their loss "
            "would only show what was memorised; name other text for validation, remove the duplicates, or "
            "train without evaluation: loop.eval_every=0",
        )
    else:
        about = "" if whole else "about "
        yield warning(
            key,
            f"{setting}: {about}{percent(share)} of the validation data are in the training data word for word "
            f"{looked}: the validation loss is lower than on new text; remove the duplicates, or name other text for "
            "validation",
        )


def source(data: DataConfig) -> tuple[str, str]:
    """The key that names the source of the validation data, alone and with its value."""
    for key in ("validation_path", "path"):
        if value := getattr(data, key, None):
            return f"data.{key}", f"data.{key}={value}"
    return "data", f"data={option_name(data)}"


def stretches(sequences: Sequences, at_most: int = STRETCHES) -> np.ndarray:
    """Hashes of stretches of ``sequences``, evenly spread; uint64, sorted, without duplicates."""
    length = sequences.sequence_length
    rows = -(-STRETCH // length)  # that make up one stretch
    starts = spread(len(sequences) - rows + 1, at_most)
    tokens = sequences.gather((starts[:, None] + np.arange(rows)).ravel())[0].reshape(len(starts), rows * length)
    tokens = tokens[:, : tokens.shape[1] // STRETCH * STRETCH].reshape(-1, STRETCH)
    tokens = tokens[spread(len(tokens), at_most)]
    distinct = (np.diff(np.sort(tokens, axis=1), axis=1) != 0).sum(axis=1) + 1
    tokens = tokens[distinct >= DISTINCT]
    return np.unique(window_hashes(tokens.ravel())[::STRETCH]) if len(tokens) else np.empty(0, np.uint64)


def sampled_rows(sequences: Sequences) -> list[range]:
    """The sequences to search, as ranges that make blocks: all of them, or blocks evenly spread."""
    most = min(MAX_TOKENS // sequences.sequence_length, MAX_ROWS)
    rows = max(1, (BLOCK if len(sequences) <= most else SMALL_BLOCK) // sequences.sequence_length)
    blocks = spread(-(-len(sequences) // rows), max(1, most // rows))
    return [range(start, min(start + rows, len(sequences))) for start in (blocks * rows).tolist()]


def look_up(wanted: np.ndarray, sequences: Sequences, rows: list[range]) -> np.ndarray:
    """Count the windows of the sequences ``rows`` that have each of the sorted hashes ``wanted``."""
    found = np.zeros(len(wanted), np.int64)
    marked = np.zeros(1 << 16, bool)  # a first sieve: the upper bits of what is wanted
    marked[wanted >> np.uint64(48)] = True
    beyond = -(-STRETCH // sequences.sequence_length)  # rows that the last windows of a block reach into
    for block in rows:
        stop = min(block.stop + beyond, len(sequences))
        tokens = sequences.gather(np.arange(block.start, stop))[0].ravel()[
            : len(block) * sequences.sequence_length + STRETCH - 1
        ]
        if len(tokens) >= STRETCH:
            hashes = window_hashes(tokens)
            hashes = hashes[marked[hashes >> np.uint64(48)]]
            places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            found += np.bincount(places[wanted[places] == hashes], minlength=len(wanted))
    return found


def number_in_all(found: np.ndarray, looked_through: float) -> float:
    """Estimate the number of stretches in the training data from the times that each was ``found`` in a share of them.

    Dividing by that share would be wrong: a licence that is in every file is found in any part of them.  The numbers
    of those found once and of those found twice tell the rare from the frequent (Chao and Lin 2012, "Nonparametric
    lower bounds for species richness and shared species richness under sampling without replacement").
    """
    seen = int(np.count_nonzero(found))
    if looked_through == 1 or not seen:
        return seen
    once, twice = np.count_nonzero(found == 1), np.count_nonzero(found == 2)
    unseen = once**2 / (2 * twice + once * looked_through / (1 - looked_through)) if once else 0.0
    return min(seen + unseen, len(found))


def window_hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of each window of STRETCH ``tokens``: uint64 ``(len(tokens) - STRETCH + 1,)``."""
    hashes = tokens.astype(np.uint64) + np.uint64(1)
    hashes *= np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(29)
    for exponent, multiplier in enumerate(MULTIPLIERS):
        half = 2**exponent
        longer = hashes[:-half] * np.uint64(multiplier)
        longer += hashes[half:]
        hashes = longer
    return hashes


def spread(number: int, at_most: int) -> np.ndarray:
    """Up to ``at_most`` of ``range(number)``, evenly spread; int64."""
    if number <= 0:
        return np.empty(0, np.int64)
    return np.unique(np.linspace(0, number - 1, min(number, at_most)).astype(np.int64))
