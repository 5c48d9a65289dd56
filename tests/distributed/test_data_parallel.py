"""Ranks that share a unit by DDP, FSDP and HSDP give the numbers of one process."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.sharing import compare
from tests.helpers.ranks import Ranks

RELATIVE = 1e-5
MODES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def check(ranks: Ranks, mode: str, options: dict[str, Any] | None = None, **setting: Any) -> None:
    for differences in ranks.run(compare, mode, setting, options):
        flags = {name: differences.pop(name) for name in ("same", "clipped")}
        print(mode, setting, differences)
        assert all(flags.values()), flags
        assert max(differences.values()) < RELATIVE, differences


@pytest.mark.parametrize("kind", ["gpt", "gpt untied", "llama", "gpt lora"])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_train_as_one_process(two: Ranks, mode: str, kind: str) -> None:
    check(two, mode, kind=kind)


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "lion", "adam", "adamw_bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_optimizers_update_as_in_one_process(two: Ranks, mode: str, optimizer: str) -> None:
    check(two, mode, optimizer=optimizer)
