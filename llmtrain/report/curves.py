"""Loss curves as PNG files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from llmtrain.base import format
from llmtrain.base.format import setting, visible
from llmtrain.base.png import write_png
from llmtrain.base.run_files import LOSS_PLOT, METRICS
from llmtrain.metrics import Row, read_metrics
from llmtrain.metrics.smoothing import EMA
from llmtrain.report.runs import RunSummary, differences, ranked, summarise

TRAIN, VALIDATION, RATE, ACCURACY = "#3b6ea8", "#d1603d", "#6b6b6b", "#3f8f5f"
Curve = tuple[list[float], list[float]]  # x, y; nan leaves a gap
MAX_LABELS = 12  # runs in a legend
LEGEND_CHARACTERS = 150  # of a line of the legend, about
STYLE: list[Any] = [
    "default",  # ignores matplotlibrc: LaTeX, for one, would read names as commands
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": "#555555",
        "ytick.color": "#555555",
        "axes.labelcolor": "#333333",
        "legend.frameon": False,
        "lines.solid_capstyle": "round",
    },
]


def draw_run(run_dir: Path, output: str | None = None) -> Path:
    """Write ``run_dir/loss.png``: training and validation loss, and below them the learning rate.

    ``output``: another place, which the setting of this name gives.
    """
    summary = summarise(run_dir)
    train, validation = _read(run_dir)
    path = run_dir / LOSS_PLOT if output is None else Path(output)
    with style.context(STYLE):
        figure = Figure(figsize=(8 + 4.2 * bool(summary.confusion), 5.4), layout="constrained")
        curves: Figure | SubFigure = figure
        matrix: SubFigure | None = None
        if summary.confusion:
            halves: Any = figure.subfigures(1, 2, width_ratios=(8, 4.2))
            curves, matrix = halves
        loss_axes, rate_axes = curves.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        steps, losses = _column(train, "loss")
        few = "o" if len(steps) == 1 else None
        loss_axes.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=1, marker=few, markersize=4)
        loss_axes.plot(steps, _smooth(losses), color=TRAIN, linewidth=1.8, label="training (faint: as measured)")
        if validation:
            points, values = _column(validation, "val_loss")
            loss = summary.best_val_loss if summary.accuracy is None else None
            best = (
                "" if loss is None else f", best {format.loss(loss)}{', before training' * summary.is_best_untrained}"
            )
            size = 4 if len(points) <= 40 else 0
            loss_axes.plot(
                points, values, "o-", color=VALIDATION, linewidth=1.6, markersize=size, label="validation" + best
            )
        loss_axes.set_ylabel(_unit([summary]))
        if summary.accuracy is not None:
            _draw_accuracy(loss_axes, validation)
        if matrix is not None:
            _draw_confusion(matrix.subplots(), summary)
        title = visible(run_dir.name + (f", from {summary.lineage}" if summary.parent else ""))
        loss_axes.set_title(title, loc="left", weight="bold", parse_math=False)
        if train or validation:
            loss_axes.legend(loc="upper right" if summary.accuracy is None else "center right")
        rate_axes.plot(*_column(train, "learning_rate"), color=RATE, linewidth=1.5)
        rate_axes.set_ylabel("learning rate")
        rate_axes.set_ylim(bottom=0)
        rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
        rate_axes.yaxis.set_major_locator(MaxNLocator(3))
        _count_axis(rate_axes, "step")
        curves.align_ylabels()
        write_png(figure, path, key=None if output is None else "output")
    return path


def _unit(runs: Sequence[RunSummary]) -> str:
    """Return the axis label with the unit of the loss; without a unit where the runs differ in it."""
    kinds = {run.accuracy is not None for run in runs}
    return "loss" if len(kinds) > 1 else "loss (nats per text)" if kinds == {True} else "loss (nats per token)"


def _draw_accuracy(axes: Axes, validation: Sequence[Row]) -> None:
    """Draw the validation accuracy on a scale of its own at the right."""
    right = axes.twinx()
    right.plot(*_column(validation, "accuracy"), ".-", color=ACCURACY, linewidth=1.4)
    right.set_ylim(0, 1.02)
    right.set_ylabel("validation accuracy", color=ACCURACY)
    right.grid(visible=False)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_confusion(axes: Axes, summary: RunSummary) -> None:
    """Draw the confusion matrix, shaded by the share of each row."""
    counts = np.array(summary.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [visible(label) for label in summary.labels]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set_parse_math(False)
    axes.tick_params(axis="x", rotation=0 if max(map(len, names)) * len(names) < 30 else 90)
    axes.grid(visible=False)
    for (row, column), number in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "#333333"
        size = 10 if len(names) <= 8 else 7
        axes.text(column, row, f"{number:,}", ha="center", va="center", color=colour, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    at = "" if summary.best_val_step is None else f", step {summary.best_val_step:,}"
    axes.set_title(f"best accuracy {format.percent(summary.accuracy or 0.0)}{at}", loc="left", weight="bold")


def draw_comparison(runs: Sequence[Path], path: Path, *, key: str | None = None) -> Path:
    """Write to ``path`` the validation and training curves of several runs, a colour each, the best first.

    A branch shares the rows of its parent up to the step where it begins, which a diamond marks.
    """
    summaries = ranked([summarise(run) for run in runs])
    read = [
        (label, _read(summary.path), summary.parent)
        for label, summary in zip(_labels(summaries), summaries, strict=True)
    ]
    labels = [label for label, rows, _ in read if any(rows)]
    curves = [rows for _, rows, _ in read if any(rows)]
    starts = [None if parent is None else parent[1] for _, rows, parent in read if any(rows)]
    colours = _colours(len(curves))
    x = "tokens" if _differ_in_batch([train for train, _ in curves]) else "step"
    unit = _unit(summaries)
    panels = [("validation loss", 1, "val_loss"), ("training loss (smoothed)", 0, "loss")]
    if not any(validation for _, validation in curves):
        del panels[0]
    with style.context(STYLE):
        figure = Figure(figsize=(6 * len(panels) + 0.5, 5.2), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, kind, key) in zip(grid, panels, strict=True):
            rows = [curve[kind] for curve in curves]
            own = [sum(row["step"] <= (start or -1) for row in run) for run, start in zip(rows, starts, strict=True)]
            lines = _draw_panel(axes, [_column(run, key, x) for run in rows], own, colours, smooth=key == "loss")
            axes.set_title(title, loc="left", weight="bold")
            axes.set_ylabel(unit)
            _count_axis(axes, x)
        lines = lines[:MAX_LABELS]
        shown = labels[:MAX_LABELS]
        longest = max(map(len, shown), default=1)
        columns = max(min(len(lines), 3, LEGEND_CHARACTERS // (longest + 6)), 1)
        legend = figure.legend(lines, shown, loc="outside lower center", ncols=columns)
        for text in legend.get_texts():
            text.set_parse_math(False)
        if len(labels) > MAX_LABELS:
            legend.set_title(f"the best {MAX_LABELS} of {len(labels)} runs")
        write_png(figure, path, key=key)
    return path


def _draw_panel(
    axes: Axes, curves: Sequence[Curve], inherited: Sequence[int], colours: Sequence[Any], *, smooth: bool
) -> list[Line2D]:
    """Draw one curve per run, the first, which is the best, on top.

    ``inherited`` is the number of points that each run shares with its parent; a mark shows the last of them.
    """
    shown = [_smooth(values) if smooth else values for _, values in curves]
    lines = []
    for (at, _), values, number, colour in reversed(list(zip(curves, shown, inherited, colours, strict=True))):
        lines += axes.plot(at, values, color=colour, linewidth=1.6, marker="o" if len(at) == 1 else None, markersize=4)
        if number:
            axes.plot(at[number - 1], values[number - 1], "D", color=colour, markersize=7, markeredgecolor="white")
    _cut_divergence(axes, shown)
    return lines[::-1]


def _read(run_dir: Path) -> tuple[list[Row], list[Row]]:
    """Read the train rows and the validation rows of a run; both may be empty."""
    path = run_dir / METRICS
    rows = [row for row in read_metrics(path) if "event" not in row] if path.exists() else []
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


def _column(rows: Sequence[Row], key: str, x: str = "step") -> Curve:
    """Return ``key`` over ``x``, with a gap for non-finite values and for the loss of a refused step."""
    values = [None if key == "loss" and row.get("refused") else row.get(key) for row in rows]
    return [row[x] for row in rows], [v if v is not None and math.isfinite(v) else math.nan for v in values]


def _smooth(losses: Sequence[float]) -> list[float]:
    """Average a moving average from the left and one from the right, so that the curve does not lag.

    It covers about a fiftieth of the run to each side, and at most 50 points.  Gaps stay.
    """
    beta = 1 - 1 / min(max(len(losses) / 50, 2), 50)
    left, right = EMA(beta), EMA(beta)
    from_left = [left.update(loss) for loss in losses]
    from_right = [right.update(loss) for loss in reversed(losses)][::-1]
    return [
        (before + after) / 2 if math.isfinite(loss) else math.nan
        for before, after, loss in zip(from_left, from_right, losses, strict=True)
    ]


def _differ_in_batch(runs: Sequence[Sequence[Row]]) -> bool:
    """Return whether the runs differ in tokens per step, so that curves over steps cannot be compared."""
    return len({round(rows[-1]["tokens"] / rows[-1]["step"]) for rows in runs if rows and rows[-1]["step"]}) > 1


def _cut_divergence(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Limit the axis to slightly above the first losses, so that a diverged run does not flatten the others."""
    starts = [next((v for v in values if not math.isnan(v)), math.nan) for values in curves]
    starts = [start for start in starts if not math.isnan(start)]
    known = [v for values in curves for v in values if not math.isnan(v)]
    if starts and max(known) > 1.5 * max(starts):
        top, bottom = 1.1 * max(starts), min(known)
        axes.set_ylim(bottom - 0.05 * (top - bottom), top)


def _labels(runs: Sequence[RunSummary]) -> list[str]:
    """Label each run by the settings in which it differs from the others, else by its directory's name."""
    settings = differences(runs)
    labels = [
        ", ".join(f"{key}={setting(values[index])}" for key, values in list(settings.items())[:3])
        for index in range(len(runs))
    ]
    if len(set(labels)) < len(labels):
        labels = [f"{visible(run.path.name)} {label}".rstrip() for run, label in zip(runs, labels, strict=True)]
    labels = [
        f"{label} (from {visible(run.lineage)})" if run.parent else label
        for run, label in zip(runs, labels, strict=True)
    ]
    return [f" {label}" if label.startswith("_") else label for label in labels]  # matplotlib hides those with "_"


def _colours(number: int) -> list[Any]:
    if number <= 10:
        return [colormaps["tab10"](index) for index in range(number)]
    return [colormaps["viridis"](0.95 * index / (number - 1)) for index in range(number)]


def _count_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.margins(x=0.02)


def _tick(value: float) -> str:
    text = format.count(value) if abs(value) >= 10_000 else f"{value:,.0f}"
    number, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit
