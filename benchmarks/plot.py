"""The plot of a run: a panel for each group, a bar for each contestant, whiskers from the lowest to the highest."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.groups import Group
from benchmarks.suites import Suite

COLUMNS = 2
OURS, OTHER = "#c2410c", "#94a3b8"


def draw(sections: Sequence[tuple[Suite, Sequence[Group]]], path: Path, title: str) -> None:
    """Write the PNG ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(suite, group) for suite, groups in sections for group in groups if any(r.values for r in group.rows)]
    rows = math.ceil(len(panels) / COLUMNS) or 1
    heights = [
        max(len(group.rows) for _, group in panels[start : start + COLUMNS]) for start in range(0, len(panels), COLUMNS)
    ] or [1]
    figure, axes = plt.subplots(
        rows, COLUMNS, squeeze=False, figsize=(12, 1.2 * rows + 0.36 * sum(heights)), layout="constrained",
        gridspec_kw={"height_ratios": [1.5 + height for height in heights]},
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (suite, group) in zip(axes.flat, panels, strict=False):
        draw_panel(axis, suite, group)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(axis: Any, suite: Suite, group: Group) -> None:
    """One group's bars, the first contestant on top, each with its figure behind it."""
    rows = [row for row in group.rows if row.median is not None]
    for at, row in enumerate(reversed(rows)):
        assert row.median is not None
        low, high = min(row.values), max(row.values)
        color = OURS if row.contestant in (suite.reference, "llmtrain") else OTHER
        whiskers = [[row.median - low], [high - row.median]]
        axis.barh(at, row.median, color=color, xerr=whiskers, ecolor="#334155", capsize=3, height=0.7)
        text = suite.columns[0].text(row.median)
        axis.annotate(text, (high, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row.contestant for row in reversed(rows)], fontsize=8)
    axis.set_xticks([])
    axis.set_ylim(min(len(rows) - 3, 0) - 0.6, len(rows) - 0.4)  # a lone bar is no thicker than others
    axis.set_xlim(0, 1.15 * max(max(row.values) for row in rows) or 1)
    axis.set_title(f"{suite.title}: {group.name}, {suite.columns[0].title}", fontsize=9)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
