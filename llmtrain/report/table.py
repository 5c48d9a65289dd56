"""Runs side by side, the best first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from llmtrain import format
from llmtrain.format import visible
from llmtrain.report.runs import RunSummary, differences, find_runs, ranked, summarise

MAX_SETTINGS = 5  # columns for the settings that differ
STATE_STYLES = {"finished": "green", "running": "cyan", "failed": "bold red", "interrupted": "yellow"}


def comparison(runs: Sequence[RunSummary]) -> Table:
    """A table of ``runs`` ranked by best validation loss, with a column for each setting in which they differ."""
    runs = ranked(runs)
    settings = differences(runs)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
    table.add_column("run", overflow="fold")
    shown = list(settings)[:MAX_SETTINGS]
    for key in shown:
        table.add_column(Text(visible(key)), overflow="fold")
    for heading in ("val loss", "at step", "train loss", "step", "tokens", "tok/s", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for index, run in enumerate(runs):
        table.add_row(
            Text(visible(run.path.name), style="bold" if index == 0 and len(runs) > 1 else ""),
            *(Text(setting(settings[key][index])) for key in shown),
            _shown(run.best_val_loss, format.loss),
            _shown(run.best_val_step, "{:,}".format),
            _shown(run.final_loss, format.loss),
            f"{run.step:,}/{run.max_steps:,}" if run.max_steps is not None else f"{run.step:,}",
            _shown(run.tokens, format.count),
            _shown(run.tokens_per_second, format.count),
            _shown(run.train_seconds, format.duration),
            Text(visible(run.state), style=STATE_STYLES.get(run.state, "dim")),
        )
    if len(settings) > MAX_SETTINGS:
        table.caption = Text("they also differ in " + ", ".join(visible(key) for key in list(settings)[MAX_SETTINGS:]))
    return table


def sweep_table(sweep: Path) -> Table:
    """The :func:`comparison` of all runs in a sweep's directory.  Raises ValueError if it has none."""
    return comparison([summarise(run) for run in find_runs([sweep])])


def setting(value: Any) -> str:
    """A config value as one would type it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return visible(str(value))


def _shown(value: Any, show: Any) -> str:
    return "-" if value is None else show(value)
