"""Ranks for all tests of this folder: importing torch takes them seconds, so they stay."""

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import Ranks


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks
