"""Tables of runs, the best first."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from llmtrain.base import format
from llmtrain.base.format import setting, visible
from llmtrain.report.runs import RunSummary, by_validation_data, differences, find_runs, ranked, summarise

MAX_SETTINGS = 5  # columns for the settings that differ
STATE_STYLES = {"finished": "green", "running": "cyan", "failed": "bold red", "interrupted": "yellow"}
UNLIMITED = 10_000  # columns

FIGURES: dict[str, Callable[[RunSummary], str]] = {
    "val loss": lambda run: _shown(run.best_val_loss, format.loss) + "*" * run.is_best_untrained,
    "accuracy": lambda run: _shown(run.accuracy, format.percent),
    "macro-F1": lambda run: _shown(run.macro_f1, "{:.3f}".format),
    "at step": lambda run: _shown(run.best_val_step, "{:,}".format),
    "train loss": lambda run: _shown(run.final_loss, format.loss),
    "step": lambda run: f"{run.step:,}" + ("" if run.max_steps is None else f"/{run.max_steps:,}"),
    "tokens": lambda run: format.count(run.tokens),
    "tok/s": lambda run: _shown(run.tokens_per_second, format.count),
    "time": lambda run: _shown(run.train_seconds, format.duration),
}
OF_CLASSES = ("accuracy", "macro-F1")  # shown for classifiers
DISPENSABLE = ("at step", "tokens", "tok/s", "time", "step")  # left out in this order where there is little room


class Comparison:
    """A table of runs ranked by the best validation, with a column for each setting in which they differ.

    Where the console is too narrow, columns are left out and named below the table.
    """

    def __init__(self, runs: Sequence[RunSummary], swept: Mapping[Path, Mapping[str, str]] | None = None) -> None:
        self.runs = ranked(runs)
        self.swept = swept  # the values that a sweep gave to each of the runs, in place of all that differs

    def settings(self) -> dict[str, list[Any]]:
        """Return the settings in columns: heading -> the value of each run."""
        if self.swept is None:
            return differences(self.runs)
        keys = list(dict.fromkeys(key for values in self.swept.values() for key in values))
        lasts = [key.rsplit(".", 1)[-1] for key in keys]
        headings = [key if lasts.count(last) > 1 else last for key, last in zip(keys, lasts, strict=True)]
        return {
            heading: [self.swept.get(run.path, {}).get(key, "") for run in self.runs]
            for heading, key in zip(headings, keys, strict=True)
        }

    def run_name(self, run: RunSummary) -> str:
        """Return the name of a run; of a sweep's job only its end, since the rest repeats the values."""
        return run.path.name.rpartition("-")[2] if self.swept and run.path in self.swept else run.path.name

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(width=UNLIMITED)
        number = min(len(self.settings()), MAX_SETTINGS)
        shapes = [(DISPENSABLE[:left_out], number) for left_out in range(len(DISPENSABLE) + 1)]
        shapes += [(DISPENSABLE, fewer) for fewer in reversed(range(number))]
        for left_out, settings in shapes:
            table = self.table(left_out=left_out, max_settings=settings)
            if console.measure(table, options=unlimited).maximum <= options.max_width:
                break
        yield table

    def table(self, left_out: Sequence[str], max_settings: int = MAX_SETTINGS) -> Table:
        """Build the table without the columns ``left_out``, with the first ``max_settings`` settings that differ."""
        settings = self.settings()
        classes = any(run.accuracy is not None for run in self.runs)
        figures = {
            heading: show
            for heading, show in FIGURES.items()
            if heading not in left_out and (classes or heading not in OF_CLASSES)
        }
        shown, others = list(settings)[:max_settings], list(settings)[max_settings:]
        branches = any(run.parent is not None for run in self.runs)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
        table.add_column("run", overflow="fold", min_width=8)
        if branches:
            table.add_column("from", overflow="fold")
        for key in shown:
            table.add_column(Text(visible(key)), overflow="fold")
        for heading in figures:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for index, run in enumerate(self.runs):
            table.add_row(
                Text(visible(self.run_name(run)), style="bold" if index == 0 and len(self.runs) > 1 else ""),
                *([Text(visible(run.lineage))] if branches else []),
                *(Text(setting(settings[key][index])) for key in shown),
                *(show(run) for show in figures.values()),
                Text(
                    visible(run.state) + ", diverged" * run.diverged,
                    style="bold red" if run.diverged else STATE_STYLES.get(run.state, "dim"),
                ),
            )
        remarks = []
        if any(run.is_best_untrained for run in self.runs):
            remarks.append("* before training: no later validation was better")
        if others:
            remarks.append(f"they {'also ' * bool(shown)}differ in " + ", ".join(visible(key) for key in others))
        if left_out:
            remarks.append("no room for " + ", ".join(left_out))
        if remarks:
            table.caption = Text("\n".join(remarks))
        return table


def confusion_table(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> Table:
    """Build the table of the confusion matrix: a row per true class, a column per predicted one."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("true \\ predicted", style="bold")
    for label in labels:
        table.add_column(Text(visible(label)), justify="right")
    table.add_column("recall", justify="right")
    for index, (label, counts) in enumerate(zip(labels, confusion, strict=True)):
        cells = [Text(f"{number:,}", style="green" if at == index else "") for at, number in enumerate(counts)]
        table.add_row(Text(visible(label)), *cells, format.percent(counts[index] / max(sum(counts), 1)))
    return table


def comparisons(runs: Sequence[RunSummary], swept: Mapping[Path, Mapping[str, str]] | None = None) -> RenderableType:
    """Compare ``runs``, in a table for each validation data: losses on other data cannot be ranked together."""
    groups = by_validation_data(runs)
    if len(groups) == 1:
        return Comparison(runs, swept)
    parts: list[RenderableType] = []
    for group, title in zip(groups, _titles(groups), strict=True):
        parts += [Text(), Text(visible(title), style="bold"), Comparison(group, swept)]
    return Group(Text("validated on different data, so that their losses cannot be compared"), *parts)


def _titles(groups: Sequence[Sequence[RunSummary]]) -> list[str]:
    """A title for each of ``groups``, by the settings of the data in which they differ."""
    first = [group[0] for group in groups]
    about = {key: values for key, values in differences(first).items() if key.startswith(("data", "tokenizer"))}
    titles = []
    for index, run in enumerate(first):
        settings = [f"{key}={setting(values[index])}" for key, values in list(about.items())[:MAX_SETTINGS]]
        if run.best_val_loss is None:
            settings = ["no validation loss", *settings]
        titles.append(", ".join(settings or [f"validation data {run.val_data or index + 1}"]))
    return titles


def sweep_table(sweep: Path, swept: Mapping[Path, Mapping[str, str]] | None = None) -> RenderableType:
    """Compare all runs in a sweep's directory, which varied the values ``swept``.  Raises ValueError if it has none."""
    return comparisons([summarise(run) for run in find_runs([sweep])], swept)


def _shown(value: Any, show: Callable[[Any], str]) -> str:
    return "-" if value is None else show(value)
