"""The choice of the documents, and of the parts of large ones, that validate."""

import itertools
from enum import Enum

import numpy as np

SMALL = 1 / 4  # of the validation tokens; a larger document is cut, since as a whole it would decide what they are
SLACK = 0.02  # of the validation tokens, that may be missing or too many
FEWEST = 2  # whole documents that validate; where they would be fewer, all are cut
LEAST_CUT = 64  # tokens of a document that can be cut


class Split(Enum):
    """The rule that sets text aside for validation."""

    tokens = "a share of the tokens: whole documents, chosen by their content; of large documents the end"
    documents = "every n-th document; if there are too few, the last of the tokens"


def split_documents(lengths: np.ndarray, hashes: np.ndarray, sources: np.ndarray, fraction: float) -> np.ndarray:
    """The tokens at the end of each document that validate, of its ``lengths``: none, all, or a part to cut off; int64.

    They are about ``fraction`` of all tokens, whatever the sizes of the documents.  A document of more than ``SMALL``
    of the validation tokens is cut.  The others are chosen by the ``hashes`` of their content, so neither their order
    nor their size matters, and equal documents stay together.  ``sources``, the numbers of the files that hold them,
    are treated one by one where they are large, so that each gives its share.  Where this gives less than half of the
    fraction, since most documents equal others or all are tiny, nothing validates.
    """
    held_out = np.zeros(len(lengths), np.int64)
    limit = SMALL * fraction * int(lengths.sum())
    _, first, members, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    tokens = np.bincount(members, lengths, len(first)).astype(np.int64)  # of equal documents together
    able = (counts == 1) & (tokens >= LEAST_CUT)
    is_cut = able & (tokens > limit)
    if np.count_nonzero(~is_cut) * fraction < FEWEST:
        is_cut = able
    held_out[first[is_cut]] = np.round(fraction * tokens[is_cut]).astype(np.int64)
    stays = (counts > 1) & (tokens > limit)  # cut, equal documents would validate with what they train
    whole = np.flatnonzero(~is_cut & ~stays)
    share = fraction * (1 + tokens[stays].sum() / max(tokens[whole].sum(), 1))
    chosen = np.zeros(len(first), np.int64)
    chosen[whole] = _choose(
        tokens[whole], counts[whole] == 1, sources[first[whole]], min(share, (1 + fraction) / 2), limit
    )
    is_part = chosen[members] < tokens[members]  # then the document has no equal
    held_out = np.where(chosen[members] == 0, held_out, np.where(is_part, chosen[members], lengths))
    return held_out if held_out.sum() > limit / SMALL / 2 else np.zeros(len(lengths), np.int64)


def _choose(
    tokens: np.ndarray, is_single: np.ndarray, sources: np.ndarray, fraction: float, limit: float
) -> np.ndarray:
    """The tokens that validate of each document, ordered by hash, so that each large source has its share; int64.

    All of a document or none, but for one that ``is_single``, the last one chosen, from which the rest is cut off.
    """
    strata = np.where(np.bincount(sources, tokens)[sources] > limit, sources, -1)
    order = np.argsort(strata, kind="stable")
    begins = np.flatnonzero(np.diff(strata[order], prepend=-2)).tolist()
    chosen = np.zeros(len(tokens), np.int64)
    owed = 0.0  # tokens, by what was chosen of the sources before
    for begin, end in itertools.pairwise([*begins, len(tokens)]):
        here = order[begin:end]
        sizes = tokens[here]
        goal = owed + fraction * sizes.sum()
        number = int(np.searchsorted(np.cumsum(sizes) - sizes / 2, goal))
        chosen[here[:number]] = sizes[:number]
        owed = goal - sizes[:number].sum()
    if abs(owed) > max(LEAST_CUT, SLACK * limit / SMALL):
        _settle(tokens, is_single, order, chosen, owed)
    return chosen


def _settle(tokens: np.ndarray, is_single: np.ndarray, order: np.ndarray, chosen: np.ndarray, owed: float) -> None:
    """Cut one document, so that ``chosen`` has the tokens that are ``owed``, or not those too many."""
    if owed < 0:  # a document that was chosen gives some back
        able = order[(chosen[order] > 0) & is_single[order] & (tokens[order] > max(-owed, LEAST_CUT))]
        if len(able):
            chosen[able[-1]] += round(owed)
    else:
        able = order[(chosen[order] == 0) & is_single[order] & (tokens[order] > max(owed, LEAST_CUT))]
        if len(able):
            chosen[able[-1]] = round(owed)
