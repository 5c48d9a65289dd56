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


class StepByStep(Accumulation):
    """The sums of the contract over the batch sizes of another option."""

    def __init__(self, option: Accumulation) -> None:
        self.option = option

    def batch_size_at(self, step: int, tokens: int) -> int:
        return self.option.batch_size_at(step, tokens)


@pytest.mark.parametrize(
    "option",
    [
        FixedBatch(6, 2),
        AutoBatch(6),
        RampedBatch(STAGES, Unit.steps, 2),
        RampedBatch(STAGES, Unit.tokens, 2),
        RampedBatch([Stage(0, 8), Stage(200, 4), Stage(201, 6), Stage(240, 2), Stage(900, 16)], Unit.tokens, 2),
    ],
)
@pytest.mark.parametrize("sequence_length", [1, 3, 64])
def test_stretches_are_the_batch_sizes_of_the_steps(option: Accumulation, sequence_length: int) -> None:
    reference = StepByStep(option)
    for steps in range(1, 80):
        assert option.position_after(steps, sequence_length) == reference.position_after(steps, sequence_length)
        assert option.largest_batch(steps, sequence_length) == reference.largest_batch(steps, sequence_length)
    for position in range(200):
        steps = option.steps_to(position, sequence_length)
        assert steps == reference.steps_to(position, sequence_length)
        assert option.position_after(steps, sequence_length) >= position
        assert not steps or option.position_after(steps - 1, sequence_length) < position
        assert option.steps_to(position, sequence_length, at_most=7) == min(steps, 7)


def test_position_after_no_step() -> None:
    for option in (FixedBatch(6, 2), AutoBatch(6), RampedBatch(STAGES, Unit.tokens, 2)):
        assert option.position_after(0, 32) == 0
