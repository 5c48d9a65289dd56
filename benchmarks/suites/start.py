"""From the start of the process to the end of the first step."""

from dataclasses import replace

from benchmarks.measurement import Measurement, Record
from benchmarks.suites import OURS, Column, Facts, Setup, Suite, gigabytes
from benchmarks.task import Task


def plan(setup: Setup) -> list[list[Measurement]]:
    """A group for each mode that does not compile; with ``--cold`` also the others, on an empty and a full cache."""
    groups = []
    for mode in setup.settings.modes:
        task = setup.task_for(mode, warm_up=1, steps=0, block=1)
        if not task.compiled:
            groups.append(contestants(setup, mode, task))
            groups.append([parts(setup, f"{mode}, parts of ours", task)])
        elif setup.settings.cold:
            for name in ("empty cache", "full cache"):
                group = [
                    with_own_cache(measurement, setup, mode, empty=name == "empty cache")
                    for measurement in contestants(setup, f"{mode}, {name}", task)
                ]
                groups.append(group)
    return groups


def contestants(setup: Setup, group: str, task: Task) -> list[Measurement]:
    """Our command and the peers' scripts."""
    return [setup.ours("start", group, task, worker="our_command"), *setup.peers("start", group, task)]


def parts(setup: Setup, group: str, task: Task) -> Measurement:
    """The parts of ours."""
    return setup.ours("start", group, task, "parts", worker="our_start")


def with_own_cache(measurement: Measurement, setup: Setup, mode: str, *, empty: bool) -> Measurement:
    """With a cache of compiled code of its own, emptied before or not."""
    cache = setup.cache / f"inductor-{mode}-{measurement.contestant}"
    environment = {**measurement.environment, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    return replace(measurement, environment=environment, emptied=cache if empty else None)


def seconds(record: Record, facts: Facts) -> float | None:
    """Of the whole, or of a part."""
    result = record["result"]
    return result.get("seconds", result.get("first_step_seconds"))


SUITE = Suite(
    "start", "Time to the first step",
    "From the start of the process to the end of its first optimizer step, on data that are tokenised. Ours is the "
    "command `llmtrain train`; a peer's is the script that was timed above. The parts of ours are taken in a process "
    "that does the same one after the other.",
    plan, (
        Column("seconds", seconds, "{:.2f}".format),
        Column("peak memory, GB", lambda record, facts: record["result"].get("memory_bytes"), gigabytes),
    ), reference=OURS, comparison="ours is sooner by", more_is_better=False,
)  # fmt: skip
