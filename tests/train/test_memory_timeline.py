"""Memory by category, from hand-made events."""

from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.train.memory_timeline import MAX_POINTS, PhaseBoundary, Timeline, _thinned, draw

CPU, CUDA = 0, 1


def event(ts: float, address: int, num_bytes: int, total: int = 0, device: int = CPU) -> dict[str, Any]:
    args = {"Addr": address, "Bytes": num_bytes, "Total Allocated": total, "Device Type": device}
    return {"name": "[memory]", "ts": ts, "args": args}


# one step: data until 1000, forward until 2000, backward until 3000, optimizer until 4000 microseconds
BORDERS = [
    PhaseBoundary(1000, "data"), PhaseBoundary(2000, "forward"), PhaseBoundary(3000, "backward", frozenset({30})),
    PhaseBoundary(4000, "optimizer"),
]  # fmt: skip
EVENTS = [
    event(500, 10, 7),  # the batch
    event(1100, 20, 100),  # an activation: freed in the backward pass
    event(1200, 21, 40),
    event(1300, 21, -40),  # temporary
    event(2100, 30, 50),  # a gradient
    event(2200, 31, 60),
    event(2300, 20, -100),
    event(2400, 31, -60),
    event(2500, 32, 5),  # outlives the backward pass, but is no gradient
    event(3100, 33, 9),
    event(3200, 33, -9),
    event(3300, 30, -50),
    event(3400, 40, 11),  # the address of nothing in particular
    {"name": "aten::mm", "ts": 100, "args": {}},
]


def test_memory_is_divided_by_origin_and_lifetime() -> None:
    timeline = Timeline.of(EVENTS, BORDERS, is_cuda=False, weights=1000, state=2000)
    at = dict(zip(timeline.milliseconds.tolist(), range(len(timeline.milliseconds)), strict=True))
    held = {category: {when: int(values[i]) for when, i in at.items()} for category, values in timeline.held.items()}
    assert set(held) == {"weights", "optimizer state", "gradients", "activations", "batch", "temporary"}
    assert set(held["weights"].values()) == {1000}
    assert set(held["optimizer state"].values()) == {2000}
    # the recording begins with the first event, at 500 microseconds; the point at 0 is what is there after it
    assert held["batch"][max(at)] == 7
    assert [held["activations"][when] for when in (0.6, 0.8, 1.7, 1.8)] == [100, 100, 100, 0]
    assert [held["gradients"][when] for when in (0.8, 1.6, 2.7, 2.8)] == [0, 50, 50, 0]
    assert [held["temporary"][when] for when in (0.7, 0.8, 1.7, 1.9, 2.0, 2.6, 2.7, 2.9)] == [
        40,
        0,
        60,
        0,
        5,
        14,
        5,
        16,
    ]
    assert timeline.total.max() == 3000 + 7 + 100 + 50 + 60
    assert timeline.peak == {
        "weights": 1000, "optimizer state": 2000, "gradients": 50, "activations": 100, "batch": 7, "temporary": 60,
    }  # fmt: skip
    assert timeline.boundaries == [(0.5, "data"), (1.5, "forward"), (2.5, "backward"), (3.5, "optimizer")]


def test_memory_allocated_before_is_counted_on_a_gpu() -> None:
    events = [
        event(100, 1, 99, device=CPU),
        event(200, 10, 100, total=1000 + 2000 + 300 + 100, device=CUDA),
        event(300, 5, -250, total=3150, device=CUDA),  # of before
    ]
    timeline = Timeline.of(events, BORDERS, is_cuda=True, weights=1000, state=2000)
    assert timeline.held["other, from before"].tolist() == [300, 300, 50]
    assert timeline.total.tolist() == [3300, 3400, 3150]


def test_a_timeline_without_events_is_drawn(tmp_path: Path) -> None:
    timeline = Timeline.of([], [], is_cuda=False, weights=0, state=0)
    draw(timeline, tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_a_long_timeline_is_thinned_and_keeps_its_peak() -> None:
    total = np.zeros(100_000)
    total[54_321] = 7
    chosen = _thinned(total)
    assert len(chosen) <= MAX_POINTS + 1
    assert total[chosen].max() == 7
    assert {0, 99_999} <= set(chosen.tolist())
    assert _thinned(np.zeros(10)).tolist() == list(range(10))
