"""The batch size as a function of the step."""

import pytest

from llmtrain.accumulation import Accumulation
from llmtrain.accumulation.auto import AutoBatch
from llmtrain.accumulation.fixed import FixedBatch
from llmtrain.accumulation.ramp import RampedBatch, Stage, Unit

STAGES = [Stage(0, 2), Stage(10, 4), Stage(25, 7)]


def test_fixed_has_one_batch_size_for_every_step():
    batch = FixedBatch(batch_size=10, micro_batch_size=4)  # the last micro-batch has 2
    assert {batch.batch_size_at(step, step * 100) for step in range(5)} == {10}
    assert batch.micro_batch_size == 4


def test_ramp_follows_its_stages_by_step():
    batch = RampedBatch(stages=STAGES, unit=Unit.steps, micro_batch_size=2)
    expected = {0: 2, 9: 2, 10: 4, 24: 4, 25: 7, 10**9: 7}
    assert {step: batch.batch_size_at(step, tokens=0) for step in expected} == expected


def test_ramp_follows_its_stages_by_token():
    batch = RampedBatch(stages=STAGES, unit=Unit.tokens, micro_batch_size=2)
    expected = {0: 2, 9: 2, 10: 4, 24: 4, 25: 7, 10**12: 7}
    assert {tokens: batch.batch_size_at(0, tokens) for tokens in expected} == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedBatch(batch_size=0, micro_batch_size=1), "batch_size=0: must be positive"),
        (lambda: FixedBatch(batch_size=1, micro_batch_size=-1), "micro_batch_size=-1: must be positive"),
        (lambda: RampedBatch(STAGES, Unit.steps, 0), "micro_batch_size=0: must be positive"),
        (lambda: RampedBatch([Stage(0, 2), Stage(5, 0)], Unit.steps, 1), r"stages\[1\].batch_size=0: must be positive"),
        (lambda: RampedBatch([], Unit.steps, 1), r"stages: start=\[\]: the starts must begin at 0"),
        (lambda: RampedBatch([Stage(1, 2)], Unit.steps, 1), r"stages: start=\[1\]: the starts must begin at 0"),
        (lambda: RampedBatch([Stage(0, 2), Stage(0, 3)], Unit.steps, 1), r"stages: start=\[0, 0\]: .* and increase"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    "option",
    [FixedBatch(6, 2), AutoBatch(6), RampedBatch(STAGES, Unit.steps, 2), RampedBatch(STAGES, Unit.tokens, 2)],
)
def test_a_batch_size_holds_until_its_next_change(option: Accumulation) -> None:
    for step, tokens in ((step, 3 * step) for step in range(60)):
        size, change = option.batch_size_at(step, tokens), option.next_change(step, tokens)
        last_step = 100 if change.step is None else change.step - 1
        last_tokens = 1000 if change.tokens is None else change.tokens - 1
        assert option.batch_size_at(last_step, last_tokens) == size
        if change.step is not None:
            assert option.batch_size_at(change.step, tokens) != size
        if change.tokens is not None:
            assert option.batch_size_at(step, change.tokens) != size
