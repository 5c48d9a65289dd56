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


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


def check(ranks: Ranks, mode: str, options: dict[str, Any] | None = None, **setting: Any) -> None:
    """Compare a run of ``ranks`` with one of a single process."""
    for differences in ranks.run(compare, mode, setting, options):
        print(mode, setting, differences)
        assert differences["same"], "ranks differ"
        assert differences["clipped"]
        apart = differences.pop("apart")
        assert apart < 1e-3
        if setting.get("optimizer") == "adamw_bf16":  # a last bit decides where a moment is rounded to
            del differences["weights"]
        assert max(differences[name] for name in differences.keys() - {"same", "clipped"}) < RELATIVE, differences


@pytest.mark.parametrize("kind", ["gpt", "gpt untied", "llama", "gpt lora"])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_train_as_one_process(two: Ranks, mode: str, kind: str) -> None:
    check(two, mode, kind=kind)


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "lion", "adam", "adamw_bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_optimizers_update_as_in_one_process(two: Ranks, mode: str, optimizer: str) -> None:
    check(two, mode, optimizer=optimizer)


@pytest.mark.parametrize("clipping", ["value", "per_parameter", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_clipping_is_that_of_whole_gradients(two: Ranks, mode: str, clipping: str) -> None:
    check(two, mode, clipping=clipping, kind="gpt lora")


@pytest.mark.parametrize(
    ("sequences", "micro_batch_size", "targets"),
    [(5, 1, "uneven"), (6, 1, "first"), (1, 2, "all"), (8, 4, "all")],
    ids=["a filler", "a rank without targets", "a rank without sequences", "one micro-batch"],
)
@pytest.mark.parametrize("mode", MODES)
def test_uneven_parts_give_the_gradient_of_the_batch(
    two: Ranks, mode: str, sequences: int, micro_batch_size: int, targets: str
) -> None:
    check(two, mode, sequences=sequences, micro_batch_size=micro_batch_size, targets=targets, optimizer="sgd")


@pytest.mark.parametrize(
    "options",
    [{"reshard_after_forward": False}, {"keeps_whole_gradients": True}],
    ids=["blocks stay gathered", "one exchange of gradients"],
)
def test_ways_of_sharding_give_the_same(two: Ranks, options: dict[str, Any]) -> None:
    check(two, "fsdp", options, micro_batch_size=1)


@pytest.mark.parametrize("recomputation", ["full", "selective"])
def test_recomputation_under_sharding_gives_the_same(two: Ranks, recomputation: str) -> None:
    check(two, "fsdp", recomputation=recomputation)


def test_ddp_trains_adapters_on_packed_weights(two: Ranks) -> None:
    check(two, "ddp", kind="gpt lora bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [{"kind": "gpt"}, {"kind": "llama", "optimizer": "muon"}, {"kind": "gpt lora", "clipping": "per_parameter"}],
    ids=["gpt", "llama muon", "lora"],
)
def test_hybrid_sharding_trains_as_one_process(four: Ranks, setting: dict[str, Any]) -> None:
    check(four, "hsdp", micro_batch_size=1, sequences=7, **setting)


@pytest.mark.slow
def test_hybrid_sharding_with_whole_gradients_trains_as_one_process(four: Ranks) -> None:
    check(four, "hsdp", {"keeps_whole_gradients": True}, micro_batch_size=1, sequences=7)


@pytest.mark.slow
def test_four_shards_of_uneven_sizes_train_as_one_process(four: Ranks) -> None:
    check(four, "fsdp", kind="gpt lora", optimizer="muon", sequences=6, micro_batch_size=1)
