"""The visiting order: a permutation an epoch, well mixed, a function of its arguments alone."""

import numpy as np
import pytest

from llmtrain.data.order.permutation import order


def test_every_epoch_visits_everything_once() -> None:
    for n in [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4097]:
        for seed in (0, 1):
            visited = order(np.arange(3 * n), n, seed, True).reshape(3, n)
            np.testing.assert_array_equal(np.sort(visited, axis=1), np.broadcast_to(np.arange(n), (3, n)))


def test_the_order_is_the_same_for_positions_in_any_grouping() -> None:
    n = 100
    whole = order(np.arange(5 * n), n, 3, True)
    parts = [order(np.arange(start, start + 50), n, 3, True) for start in range(0, 5 * n, 50)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(order(np.arange(5 * n)[::-7], n, 3, True), whole[::-7])
    assert order(np.array([250]), n, 3, True) == whole[250]


def test_seeds_and_epochs_have_different_orders() -> None:
    n = 1000
    orders = [order(np.arange(n) + epoch * n, n, seed, True) for seed in (-1, 0, 1, 2**40) for epoch in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # two random permutations agree in one place on average


def test_without_shuffling_positions_are_visited_in_order() -> None:
    np.testing.assert_array_equal(order(np.arange(25), 10, 0, False), np.arange(25) % 10)


def test_the_order_works_for_a_trillion_sequences() -> None:
    n = 2**40 - 12345
    positions = np.concatenate([np.arange(1000), np.arange(n - 1000, n + 1000), [7 * n + 5]])
    visited = order(positions, n, 0, True)
    assert visited.dtype == np.int64
    assert 0 <= visited.min() <= visited.max() < n
    assert len(np.unique(visited[:2000])) == 2000
    assert abs(visited.mean() / n - 0.5) < 0.03
    assert abs(np.corrcoef(positions[:1000], visited[:1000])[0, 1]) < 0.1


@pytest.mark.parametrize("n", [3, 5, 7, 18, 33, 100])
def test_the_order_is_statistically_uniform(n: int) -> None:
    """Chi-square, over epochs, of which sequence stands where and of the distance between neighbours.

    Both statistics, over their degrees of freedom, are 1 for random permutations, with a standard deviation of
    sqrt(2 / degrees).
    """
    epochs = 20_000
    visited = order(np.arange(n * epochs), n, 5, True).reshape(epochs, n)
    counts = np.stack([np.bincount(visited[:, place], minlength=n) for place in range(n)])
    expected = epochs / n
    degrees = (n - 1) ** 2
    assert abs(((counts - expected) ** 2 / expected).sum() / degrees - 1) < 5 * np.sqrt(2 / degrees)
    distances = np.bincount(((visited[:, 1:] - visited[:, :-1]) % n).ravel(), minlength=n)[1:]
    expected = distances.sum() / (n - 1)
    assert ((distances - expected) ** 2 / expected).sum() / (n - 2) - 1 < 5 * np.sqrt(2 / (n - 2))


def test_the_order_is_the_same_in_every_version() -> None:
    """Runs are resumed by later versions of the program: these values are for ever."""
    assert order(np.arange(10), 10, 0, True).tolist() == [8, 1, 2, 0, 3, 4, 6, 5, 9, 7]
    assert order(np.arange(5) + 10**9, 10**6, 42, True).tolist() == [764491, 70623, 941560, 619231, 129686]
