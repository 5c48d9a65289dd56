"""The order of visiting sequences: computed, not stored.

Each epoch visits every sequence once, by a keyed permutation of their numbers: a Feistel network over the next
power of two (Luby and Rackoff 1988), walked along its cycle until it lands on a sequence that exists (Black and
Rogaway 2002, "Ciphers with Arbitrary Finite Domains").  It takes no memory at any size of the
corpus, and the order depends on ``(seed, epoch)`` alone.
"""

import numpy as np

ROUNDS = 8  # four suffice for large domains; small halves mix less per round.  Even, so that the halves end in place
MIN_BITS = 6  # in smaller domains the network reaches too few permutations for the order to look random
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of SplitMix64 (Steele et al. 2014)


def order(positions: np.ndarray, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """The sequence, of ``n``, that is visited at each of ``positions``: int64.

    Position ``epoch * n + offset`` is the ``offset``-th visit of its epoch; positions may lie in several epochs.
    """
    epochs, offsets = np.divmod(positions.astype(np.int64), n)
    if not shuffle or n == 1:
        return offsets
    keys = mix(epochs.astype(np.uint64) + mix(np.array([seed % 2**64], np.uint64)))
    visited = _permute(offsets.astype(np.uint64), keys, n)
    while (beyond := np.flatnonzero(visited >= n)).size:
        visited[beyond] = _permute(visited[beyond], keys[beyond], n)
    return visited.astype(np.int64)


def _permute(values: np.ndarray, keys: np.ndarray, n: int) -> np.ndarray:
    """A permutation of ``[0, 2**bits)``, the smallest such range with ``n`` numbers, for each key; uint64."""
    bits = max((n - 1).bit_length(), MIN_BITS)
    low_bits, high_bits = bits - bits // 2, bits // 2
    high, low = values >> np.uint64(low_bits), values & np.uint64(2**low_bits - 1)
    for i in range(ROUNDS):
        noise = mix(low ^ (keys + np.uint64(i * GOLDEN % 2**64)))
        # the halves differ in width by one bit where ``bits`` is odd, and swap every round
        high, low = low, high ^ (noise & np.uint64(2**high_bits - 1))
        low_bits, high_bits = high_bits, low_bits
    return high << np.uint64(low_bits) | low


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose output bits each depend on all input bits: the finaliser of SplitMix64."""
    values = values + np.uint64(GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
