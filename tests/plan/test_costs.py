"""Counts, time, energy, price and disk, with literal expectations."""

import pytest

from llmtrain import Run
from llmtrain.plan.costs import SAVED_PER_SECOND, Speed, add_up, count_work, without_long_saves

TINY = ("model=tiny", "tokenizer=byte")


def run(*overrides: str) -> Run:
    return Run.compose(*TINY, *overrides)


def test_evaluations_samples_and_saves_are_counted() -> None:
    made = run("loop.eval_every=100", "loop.eval_batches=20", "loop.sample_every=400", "checkpoint.every_steps=250")
    counts = count_work(made.loop, made.checkpoint, steps=1000, sequences=8000, batch=8, validation=500)
    assert counts.evaluations == 11  # before step 1, after 100, …, 1000
    assert counts.evaluated == 160
    assert counts.samples == 3  # 400, 800, and at the end
    # 100, …, 900 ahead of evaluations (400 and 800 are among them), 250 and 750, and the end
    assert counts.saves == 12
    assert counts.held_saves == 10
    assert counts.ahead == 8  # without 500
    assert counts.copied_saves == 3  # 250, 500, 750


def test_long_saves_ahead_of_evaluations_are_counted_as_the_loop_makes_them() -> None:
    made = run("loop.eval_every=100", "loop.sample_every=0", "checkpoint.every_steps=0")
    counts = count_work(made.loop, made.checkpoint, steps=1000, sequences=1000, batch=1, validation=10)
    assert (counts.saves, counts.held_saves, counts.ahead, counts.copied_saves) == (10, 10, 9, 0)
    speed = Speed(sequence=1.0, evaluated=0.0, sampled=0.0)
    assert without_long_saves(counts, speed, round(0.9 * SAVED_PER_SECOND)) == counts
    fewer = without_long_saves(counts, speed, round(50 * SAVED_PER_SECOND))
    assert (fewer.saves, fewer.held_saves, fewer.ahead) == (4, 4, 3)  # the first, and two in 1,000 seconds; the end
    assert without_long_saves(counts, speed, round(2 * SAVED_PER_SECOND)) == counts


def test_a_run_without_validation_data_counts_no_evaluation() -> None:
    made = run("loop.sample_every=0", "checkpoint.every_steps=0")
    counts = count_work(made.loop, made.checkpoint, steps=10, sequences=80, batch=8, validation=0)
    assert (counts.evaluations, counts.samples, counts.saves, counts.held_saves) == (0, 0, 1, 1)


def test_costs_are_the_sum_of_their_parts() -> None:
    made = run("loop.eval_every=0", "loop.sample_every=0", "checkpoint.every_steps=0", "checkpoint.keep_last=2")
    counts = count_work(made.loop, made.checkpoint, steps=100, sequences=800, batch=8, validation=0)
    speed = Speed(sequence=4.5, evaluated=1.0, sampled=1.0)
    costs = add_up(speed, counts, made.loop, made.checkpoint, int(SAVED_PER_SECOND), watts=500, price_per_hour=3.0)
    assert costs.seconds == {"training": 3600, "evaluation": 0, "samples": 0, "saving": 1, "start": 0}
    assert costs.kilowatt_hours == pytest.approx(0.5, rel=1e-3)
    assert costs.price == pytest.approx(3.0, rel=1e-3)
    assert costs.disk_bytes == SAVED_PER_SECOND  # one save in all


def test_disk_space_is_that_of_kept_checkpoints_and_one_more() -> None:
    made = run("loop.eval_every=0", "loop.sample_every=0", "checkpoint.every_steps=10", "checkpoint.keep_last=2",
               "checkpoint.keep_best=1")  # fmt: skip
    counts = count_work(made.loop, made.checkpoint, steps=100, sequences=800, batch=8, validation=0)
    costs = add_up(Speed(1, 1, 1), counts, made.loop, made.checkpoint, 1000, watts=None, price_per_hour=None)
    assert costs.disk_bytes == 4000
    assert costs.kilowatt_hours is None
    assert costs.price is None
