"""Loaders alone."""

from dataclasses import replace

from benchmarks.measurement import Measurement, Record
from benchmarks.suites import OURS, Column, Facts, Setup, Suite, figure
from benchmarks.workers.loaders import MAKERS


def plan(setup: Setup) -> list[list[Measurement]]:
    """A group for each batch size, and one for batches of eight."""
    groups = []
    for batch_size in dict.fromkeys([*setup.settings.batch_sizes, 8]):
        group = f"{batch_size} × {setup.task.context}"
        task = setup.task_for(setup.settings.modes[0], batch_size=batch_size)
        groups.append(
            [setup.ours("loader", group, replace(task, contestant=name), name, worker="loaders") for name in MAKERS]
        )
    return groups


def times_needed(record: Record, facts: Facts) -> float | None:
    """How many times the tokens that the fastest training takes."""
    return None if facts.needed is None else record["result"]["tokens_per_second"] / facts.needed


SUITE = Suite(
    "loader", "Loaders alone",
    "Shuffled batches from the same token file, as fast as they come, onto the device.",
    plan, (
        Column("million tok/s", figure("tokens_per_second"), lambda rate: f"{rate / 1e6:,.1f}"),
        Column("times what the fastest step needs", times_needed, lambda times: f"{times:,.0f}"),
    ), reference=OURS, comparison="ours is faster by",
)  # fmt: skip
