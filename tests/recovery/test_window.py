"""The window's limits against NumPy and numbers computed by hand; the ring, the state, no waiting for a GPU."""

import json
import math

import numpy as np
import pytest
import torch

from llmtrain.recovery.window import Window

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def window(size: int = 128, min_steps: int = 1, deviations: tuple = (10.0, 50.0), floors: tuple = (0.0, 0.0)) -> Window:
    return Window(CPU, size, min_steps, deviations, floors)


def add(to: Window, losses: list[float], norms: list[float] | None = None, accepted: torch.Tensor = YES) -> Window:
    for loss, norm in zip(losses, norms or losses, strict=True):
        to.add(torch.tensor([loss, norm]), accepted)
    return to


@pytest.mark.parametrize(
    ("values", "deviations", "floor", "limit"),
    [
        ([5.0, 1.0, 3.0, 2.0, 4.0], 10.0, 0.0, 17.826),  # median 3, distances 0 1 1 2 2
        ([10.0, 2.0, 1.0, 3.0], 10.0, 0.0, 17.326),  # median 2.5, distances 0.5 0.5 1.5 7.5: MAD 1
        ([7.0], 10.0, 0.0, math.inf),  # no measure of what is far
        ([0.0, 0.0, 0.0], 10.0, 0.1, math.inf),
        ([0.0, 0.0, 1.0, 2.0], 2.0, 0.0, 0.5 + 2.0 * 1.4826 * 0.5),
        ([2.0, 2.0, 2.0, 2.0], 10.0, 0.02, 2.4),  # no spread: the floor counts
        ([5.0, 1.0, 3.0, 2.0, 4.0], 10.0, 0.02, 17.826),  # and not where the spread is larger
        ([-2.0, -2.0], 10.0, 0.1, 0.0),
    ],
)
def test_limits_equal_those_computed_by_hand(
    values: list[float], deviations: float, floor: float, limit: float
) -> None:
    made = add(window(deviations=(deviations, 1.0), floors=(floor, 0.0)), values)
    assert made.limits()[0].item() == pytest.approx(limit, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 31, 127, 128, 129, 300, 512])
def test_limits_equal_medians_of_numpy(steps: int) -> None:
    chance = np.random.default_rng(steps)
    losses, norms = 3 + chance.standard_t(3, steps), np.exp(chance.normal(size=steps))
    made = add(window(floors=(0.02, 0.1)), losses.tolist(), norms.tolist())
    for measured, values, deviations, floor in zip(
        made.limits().tolist(), (losses, norms), (10.0, 50.0), (0.02, 0.1), strict=True
    ):
        last = values[-128:].astype(np.float32).astype(np.float64)
        median = np.median(last)
        mad = np.median(np.abs(last - median))
        assert measured == pytest.approx(median + deviations * max(1.4826 * mad, floor * abs(median)), rel=1e-5)


def test_one_outlier_hardly_moves_the_limit() -> None:
    made = add(window(), [3.0 + 0.01 * (i % 11) for i in range(99)])
    before = made.limits()[0].item()
    add(made, [1e6])
    assert made.limits()[0].item() == pytest.approx(before, abs=0.02)


def test_a_limit_needs_enough_steps_and_a_deviation() -> None:
    made = window(min_steps=32, deviations=(10.0, 0.0), floors=(0.02, 0.1))
    assert made.limits().tolist() == [math.inf, math.inf]
    add(made, [3.0] * 31)
    assert made.limits().tolist() == [math.inf, math.inf]
    add(made, [3.0])
    assert made.limits().tolist() == [pytest.approx(3.6), math.inf]


def test_steps_that_are_not_accepted_change_no_limit() -> None:
    made = add(window(size=8), [float(i) for i in range(13)])
    before, limits = made.values.numpy().tobytes(), made.limits()
    add(made, [50.0, math.nan, math.inf], accepted=NO)
    assert made.values.numpy().tobytes() == before
    assert torch.equal(made.limits(), limits)
    assert made.state_dict()["loss"] == [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]


@pytest.mark.parametrize("steps", [0, 1, 7, 8, 9, 16, 21])
def test_the_state_is_json_and_exact(steps: int) -> None:
    chance = np.random.default_rng(0)
    values = (chance.normal(size=steps).astype(np.float32) / 3).tolist()
    made = add(window(size=8, min_steps=2), values, [v * v for v in values])
    text = json.dumps(made.state_dict(), allow_nan=False)
    assert json.loads(text)["loss"] == values[-8:]
    again = window(size=8, min_steps=2)
    again.load_state_dict(json.loads(text))
    for value in chance.normal(size=20).tolist():
        assert torch.equal(made.limits(), again.limits())
        add(made, [value])
        add(again, [value])
    assert made.state_dict() == again.state_dict()


def test_another_size_holds_the_newest() -> None:
    state = add(window(size=8), [float(i) for i in range(10)]).state_dict()
    small, large = window(size=3), window(size=16)
    small.load_state_dict(state)
    large.load_state_dict(state)
    assert small.state_dict()["loss"] == [7.0, 8.0, 9.0]
    assert add(small, [10.0]).state_dict()["grad_norm"] == [8.0, 9.0, 10.0]
    assert add(large, [10.0]).state_dict()["loss"] == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    large.load_state_dict({})
    assert large.state_dict() == {"loss": [], "grad_norm": []}


def test_a_restart_forgets_the_window() -> None:
    made = add(window(size=4, min_steps=2), [1.0, 2.0, 3.0])
    made.restart()
    assert made.limits().tolist() == [math.inf, math.inf]
    assert add(made, [5.0, 7.0]).limits().tolist() == pytest.approx([20.826, 80.13])
