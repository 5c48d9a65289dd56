"""The share of tokens that validates, for documents of any sizes."""

import numpy as np
import pytest

from llmtrain.data.order.document_split import split_documents

rng = np.random.default_rng(0)
SIX = [100_000, 5_000, 200_000, 900, 40_000, 700_000]
SIZES = {
    "six": SIX,
    "equal": [500] * 6,
    "one": [5145],
    "many": rng.lognormal(6, 2, 1000).astype(int).tolist(),
    "heavy": ((rng.pareto(1, 3000) + 1) * 100).astype(int).tolist(),
    "one large": [10**6] + [100] * 1000,
    "tiny": [5] * 40,
}


def split(
    lengths: list[int], fraction: float, hashes: list[int] | None = None, sources: list[int] | None = None
) -> np.ndarray:
    number = len(lengths)
    return split_documents(
        np.array(lengths, np.int64),
        np.array(hashes if hashes is not None else rng.integers(0, 1 << 62, number), np.int64),
        np.array(sources if sources is not None else range(number), np.int64),
        fraction,
    )


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", SIZES)
def test_the_share_of_tokens_is_met_for_any_sizes(name: str, fraction: float) -> None:
    lengths = SIZES[name]
    held_out = split(lengths, fraction)
    assert (held_out >= 0).all()
    assert (held_out <= lengths).all()
    assert held_out.sum() / sum(lengths) == pytest.approx(fraction, rel=0.05)


def test_each_large_document_gives_its_share() -> None:
    held_out = split(SIX, 0.1)
    assert np.round(held_out[[0, 2, 5]] / np.array(SIX)[[0, 2, 5]], 3).tolist() == [0.1, 0.1, 0.1]


def test_each_large_source_gives_its_share() -> None:
    """Two languages of many rows, one of them rare."""
    sources = [0] * 2000 + [1] * 500
    held_out = split([300] * 2500, 0.1, sources=sources)
    of_source = np.bincount(sources, held_out) / np.bincount(sources, [300] * 2500)
    assert of_source == pytest.approx([0.1, 0.1], abs=0.005)


def test_the_order_of_documents_changes_nothing_and_no_pattern_is_followed() -> None:
    """Ten languages that take turns: every tenth document would be one language."""
    hashes = rng.integers(0, 1 << 62, 2000)
    held_out = split([300] * 2000, 0.1, hashes.tolist(), [0] * 2000)
    backwards = split([300] * 2000, 0.1, hashes[::-1].tolist(), [0] * 2000)
    assert held_out.tolist() == backwards[::-1].tolist()
    assert (np.bincount(np.flatnonzero(held_out) % 10, minlength=10) > 5).all()


def test_short_and_long_documents_are_chosen_alike() -> None:
    lengths = [100, 2000] * 2000
    chosen = split(lengths, 0.1, sources=[0] * 4000) == lengths
    assert [chosen[::2].sum(), chosen[1::2].sum()] == pytest.approx([200, 200], abs=50)


def test_equal_documents_stay_together() -> None:
    hashes = [number // 2 for number in range(400)]
    held_out = split([500] * 400, 0.1, hashes)
    assert held_out[::2].tolist() == held_out[1::2].tolist()
    assert held_out.sum() == pytest.approx(0.1 * 200_000, rel=0.05)
    large = split([50_000, 50_000, *[500] * 100], 0.1, [7, 7, *range(100, 200)])
    assert large[:2].tolist() == [0, 0]  # the end of one would be training text of the other


def test_nothing_validates_where_all_documents_are_equal() -> None:
    assert not split([500] * 100, 0.1, [7] * 100).any()
