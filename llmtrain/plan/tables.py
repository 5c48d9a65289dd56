"""Tables of a plan in the terminal."""

from collections.abc import Callable, Mapping

from rich.table import Table
from rich.text import Text

from llmtrain.plan.chart import bar


def table(title: str) -> Table:
    """A borderless table: name, number, remark."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    result.add_column()
    result.add_column(justify="right", overflow="fold")
    result.add_column(style="dim")
    return result


def bars(title: str, values: Mapping[str, float], shown: Callable[[float], str]) -> Table:
    """A table of numbers with bars beside them."""
    rows = table(title)
    most, total = max(values.values(), default=0), sum(values.values())
    for name, value in values.items():
        if value:
            rows.add_row(name, shown(value), bar(value / most))
    rows.add_row(Text("total", style="bold"), Text(shown(total), style="bold"), "")
    return rows
