"""Local SGD: the outer step beside the paper's in float64, and the replicas that do not count."""

import pytest

from llmtrain.base.options import RunFacts
from llmtrain.distributed.replicas import BUCKET, buckets
from tests.distributed.replica_cases import (
    adopted,
    agree,
    exchange_with_trouble,
    follow_paper,
    nobody_counts,
    options_of,
    sum_of,
    swap,
    train_beside_one,
)
from tests.helpers.ranks import Ranks

NONE_LOST = {"weights": 2e-6, "losses": 1e-6}


@pytest.mark.parametrize("kind", ["gpt", "gpt lora"])
def test_an_exchange_of_plain_means_after_each_step_is_data_parallel_sgd(two: Ranks, kind: str) -> None:
    values = {"kind": kind, "optimizer": "sgd", "targets": "uneven"}
    for found in two.run(train_beside_one, values):
        assert {key: found[key] < limit for key, limit in NONE_LOST.items()} == dict.fromkeys(found, True), found


@pytest.mark.slow
def test_four_replicas_are_data_parallel_sgd(four: Ranks) -> None:
    for found in four.run(train_beside_one, {"optimizer": "sgd", "sequences": 8}):
        assert {key: found[key] < limit for key, limit in NONE_LOST.items()} == dict.fromkeys(found, True), found


@pytest.mark.parametrize(("form", "limit"), [("fp32", 1e-5), ("bf16", 4e-3), ("int8", 1.5e-2)])
def test_the_outer_step_is_that_of_the_paper(two: Ranks, form: str, limit: float) -> None:
    for found in two.run(follow_paper, form, 4):
        assert found["apart"] < limit, found
        assert found["norm"] < limit, found
        assert found["own"] == 0.0
        assert found["same"]


@pytest.mark.slow
def test_the_outer_step_on_four_ranks(four: Ranks) -> None:
    for found in four.run(follow_paper, "int8", 3):
        assert found["apart"] < 1.5e-2, found
        assert found["same"]


@pytest.mark.parametrize("trouble", ["nan", "still"])
def test_a_replica_without_progress_or_with_nan_does_not_count_and_takes_up_the_common_weights(
    two: Ranks, trouble: str
) -> None:
    first, second = two.run(exchange_with_trouble, trouble)
    for found in (first, second):
        assert found["missed"] == 1
        assert found["is_first"]
        assert found["takes_up"]
        assert found["finite"]
    assert first["steps"] == 1
    assert second["steps"] == (0 if trouble == "nan" else 1)  # a moment that is not finite would stay so


def test_a_replica_that_misses_a_round_trains_on_and_counts_in_the_next(two: Ranks) -> None:
    first, second = two.run(exchange_with_trouble, "misses")
    for found in (first, second):
        assert found["missed"] == 1
        assert found["is_first"]
        # in the second round rank 0 has not moved, and rank 1 brings what it has kept
        assert found["missed_next"] == 1
        assert found["takes_up_next"]
        assert found["brings"]
    assert first["takes_up"]
    assert second["keeps"]
    assert not second["takes_up"]


def test_a_round_in_which_nobody_counts_changes_nothing(two: Ranks) -> None:
    for found in two.run(nobody_counts):
        assert found == {"weights": True, "momentum": True, "moved": True}


def test_missed_rounds_are_drawn_alike_everywhere() -> None:
    from llmtrain.base.world import ALONE

    replicas, _ = adopted(ALONE, missed_rounds=0.3)
    drawn = [[replicas.misses(50 * number, replica) for number in range(1, 401)] for replica in range(4)]
    assert all(0.2 < sum(each) / 400 < 0.4 for each in drawn)
    assert drawn[0] != drawn[1]
    again, _ = adopted(ALONE, missed_rounds=0.3)
    assert [again.misses(50 * number, 2) for number in range(1, 401)] == drawn[2]
    never, _ = adopted(ALONE)
    assert not any(never.misses(number, 0) for number in range(1, 401))


def test_the_norm_is_the_root_mean_square_and_each_replica_clips_its_own(two: Ranks) -> None:
    found = two.run(agree)
    norms = [each["own"] for each in found]
    assert norms[0] != norms[1]
    expected = (sum(norm**2 for norm in norms) / 2) ** 0.5
    for each in found:
        assert each["norm"] == pytest.approx(expected, rel=1e-6)
        assert each["own_clipped"] == pytest.approx(0.3, rel=1e-4)
        assert each["clipped"]
        assert each["agreed_largest"] == pytest.approx(max(other["largest"] for other in found), rel=1e-6)
    assert found[0]["norm"] == found[1]["norm"]


def test_an_evaluation_sees_the_common_weights(two: Ranks) -> None:
    for found in two.run(swap):
        assert found == dict.fromkeys(found, True)


# --- the exchange ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "limit"), [("fp32", 1e-6), ("bf16", 4e-3), ("int8", 1.2e-2)])
def test_a_sum_sends_as_many_bytes_as_it_says(two: Ranks, form: str, limit: float) -> None:
    found = two.run(sum_of, form, 100_003)
    assert found[0]["digest"] == found[1]["digest"]
    for each in found:
        assert each["error"] < limit
        assert each["sent"] == pytest.approx(each["expected"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_a_sum_of_four_ranks(four: Ranks, form: str) -> None:
    found = four.run(sum_of, form, 100_003)
    assert len({each["digest"] for each in found}) == 1
    for each in found:
        assert each["error"] < 1.2e-2
        assert each["sent"] == pytest.approx(each["expected"], rel=0.05)


def test_buckets_hold_whole_tensors() -> None:
    sizes = [5, BUCKET, 3, BUCKET - 3, 1, BUCKET + 7]
    found = [sizes[bucket] for bucket in buckets(sizes)]
    assert found == [[5], [BUCKET], [3, BUCKET - 3], [1], [BUCKET + 7]]
    assert list(buckets([])) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shard": 2}, "distributed.shard=1"), ({"tensor": -1, "replicate": 1}, "distributed.tensor=1"),
        ({"outer_momentum": 1.0}, "below 1"), ({"missed_rounds": 1.0}, "below 1"), ({"sync_every": 0}, "sync_every=0"),
        ({"exchange": "int4"}, "exchange"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_of(**keys)


def test_an_interval_that_the_run_does_not_reach_is_reported() -> None:
    facts = RunFacts(40, 4000, 1.0, 4, 4000, None, evaluates=False)
    assert "distributed.sync_every=4" in options_of(sync_every=50).unread(facts)["sync_every"]
    assert options_of(sync_every=10).unread(facts) == {}
