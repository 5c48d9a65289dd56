"""Throughput of training, memory and the share of the machine's rate."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.measurement import Measurement, Record
from benchmarks.suites import OURS, Column, Facts, Setup, Suite, figure, gigabytes


def plan(setup: Setup) -> list[list[Measurement]]:
    """A group for each mode and batch size: ours, its variants, and the peers."""
    settings = setup.settings
    groups = []
    for mode in settings.modes:
        for batch_size in settings.batch_sizes:
            task = setup.task_for(mode, batch_size=batch_size)
            group = group_name(mode, batch_size, settings.batch_sizes)
            variants = [
                setup.ours("training", group, replace(task, overrides=(*task.overrides, *more)), f"{OURS}, {name}")
                for name, more in settings.variants.items()
            ]
            groups.append([setup.ours("training", group, task), *variants, *setup.peers("training", group, task)])
    return groups


def group_name(mode: str, batch_size: int, batch_sizes: list[int]) -> str:
    """The mode; with the batch size where there are several."""
    return mode if len(batch_sizes) == 1 else f"{mode}, batch {batch_size}"


def flops(record: Record, facts: Facts) -> float | None:
    """Model FLOP/s."""
    rate = record["result"].get("tokens_per_second")
    return None if rate is None else rate * facts.flops_per_token


def mfu(record: Record, facts: Facts) -> float | None:
    """Share of the machine's measured rate."""
    used, rate = flops(record, facts), facts.flops_per_second.get(record["precision"])
    return None if used is None or rate is None else used / rate


def mfu_of_data_sheet(record: Record, facts: Facts) -> float | None:
    """Share of what the maker of a GPU promises."""
    used = flops(record, facts)
    return None if used is None or not facts.data_sheet or record["precision"] != "bf16" else used / facts.data_sheet


def across_modes(records: Sequence[Record]) -> list[str]:
    """A table of ours in every mode against every contestant in every mode, where there are several."""
    speeds: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        if rate := record.get("result", {}).get("tokens_per_second"):
            speeds.setdefault((record["group"], record["contestant"]), {})[record["round"]] = rate
    ours = [group for group, contestant in speeds if contestant == OURS]
    if len(ours) < 2 or len(ours) == len(speeds):
        return []
    lines = ["How much faster ours in the mode of the column is than the contestant in the mode of the row:", ""]
    lines += [f"|  |  | {' | '.join(ours)} |", "|---" * (2 + len(ours)) + "|"]
    for (group, contestant), others in speeds.items():
        if contestant != OURS:
            ratios = [[rate / others[at] for at, rate in speeds[mode, OURS].items() if at in others] for mode in ours]
            cells = [f"{statistics.median(values):.2f} ×" if values else "" for values in ratios]
            lines.append(f"| {group} | {contestant} | {' | '.join(cells)} |")
    return lines


COLUMNS = (
    Column("tok/s", figure("tokens_per_second"), lambda rate: f"{rate:,.0f}"),
    Column("model GFLOP/s", flops, lambda rate: f"{rate / 1e9:,.0f}"),
    Column("MFU", mfu, "{:.1%}".format),
    Column("of the data sheet", mfu_of_data_sheet, "{:.1%}".format),
    Column("peak memory, GB", figure("memory_bytes"), gigabytes),
)

SUITE = Suite(
    "training", "Training step",
    "The same GPT-2 from random weights on the same token file, AdamW (betas 0.9 and 0.95, weight decay 0.1), clipping "
    "at norm 1.0, the same number of threads. Ours is a whole run of `Run.train`, read from its metrics; a peer's loop "
    "is timed at the end of each block of steps. A process's figure is the median of its steps after warm-up. Model "
    "FLOPs count the mathematics of this GPT-2, whatever a contestant computes.",
    plan, COLUMNS, reference=OURS, comparison="ours is faster by", details=across_modes,
)  # fmt: skip
