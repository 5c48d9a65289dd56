"""Where our speed comes from: all of it, and without one thing at a time."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.measurement import Measurement
from benchmarks.suites import Setup, Suite
from benchmarks.suites.training import COLUMNS

ALL = "all of it"


@dataclass(frozen=True)
class Switch:
    """One thing that can be left out, by Hydra overrides or by fields of the task."""

    name: str
    overrides: tuple[str, ...] = ()
    task: tuple[tuple[str, Any], ...] = ()
    only_compiled: bool = False
    only_bf16: bool = False


PLUGINS = "plugins=[benchmarks]"

SWITCHES = (
    Switch("allocator settings", task=(("prepare_process", False),)),
    Switch("fused AdamW", (PLUGINS, "optimizer._target_=benchmarks.plain.UnfusedAdamW")),
    Switch("loss of our own", (PLUGINS, "objective._target_=benchmarks.plain.PlainLoss")),
    Switch("attention of our own", (PLUGINS, "model._target_=benchmarks.plain.TorchAttention"), only_bf16=True),
    Switch("compile", ("runtime.compile=false",), only_compiled=True),
)


def plan(setup: Setup) -> list[list[Measurement]]:
    """A group for each mode."""
    return [
        [
            setup.ours("gains", mode, setup.task_for(mode), ALL),
            *(without(setup, mode, [switch], f"without {switch.name}") for switch in switches_of(mode)),
            without(setup, mode, switches_of(mode), "without any of these"),
        ]
        for mode in setup.settings.modes
    ]


def switches_of(mode: str) -> list[Switch]:
    """Those that do something in ``mode``."""
    return [
        switch
        for switch in SWITCHES
        if ("compiled" in mode or not switch.only_compiled) and ("bf16" in mode or not switch.only_bf16)
    ]


def without(setup: Setup, mode: str, switches: list[Switch], name: str) -> Measurement:
    """Ours, these switched off."""
    task = setup.task_for(mode)
    overrides = dict.fromkeys(override for switch in switches for override in switch.overrides)
    changes = dict(pair for switch in switches for pair in switch.task)
    return setup.ours("gains", mode, replace(task, overrides=(*task.overrides, *overrides), **changes), name)


SUITE = Suite(
    "gains", "The gains, one by one",
    "Ours with everything on, and with one thing left out at a time; the factor is what that thing gives while all the "
    "others are on. The last row leaves out all of them at once.",
    plan, COLUMNS, reference=ALL, comparison="it gives",
)  # fmt: skip
