"""Bar charts of memory and time, in the terminal and as PNG."""

from collections.abc import Mapping
from pathlib import Path

from rich.text import Text

from llmtrain.base.format import duration, size
from llmtrain.base.png import write_png

WIDTH = 32  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
COLOURS = ("#3b6ea8", "#d1603d", "#7a9a5b", "#c9a227", "#7d5ba6", "#4a9a9a", "#999999", "#555555", "#b07aa1")


def bar(share: float) -> Text:
    """Format a bar of ``share`` of the full width, in eighths of a character."""
    eighths = round(max(0.0, min(share, 1.0)) * WIDTH * 8)
    return Text("█" * (eighths // 8) + EIGHTHS[eighths % 8].strip(), style="blue")


def draw(
    path: Path, title: str, memory: Mapping[str, float], available: float | None, seconds: Mapping[str, float]
) -> None:
    """Write the bars of ``memory``, in bytes, and ``seconds`` as PNG to ``path``, whole or not at all."""
    from matplotlib import style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    def bars(axes: Axes, values: Mapping[str, float], heading: str, shown: object) -> None:
        assert callable(shown)
        values = {name: value for name, value in values.items() if value > 0}
        names = list(values)[::-1]
        places = axes.barh(names, [values[name] for name in names], color=[
            COLOURS[index % len(COLOURS)] for index in reversed(range(len(names)))
        ])  # fmt: skip
        axes.bar_label(places, [shown(values[name]) for name in names], padding=4)
        axes.set_title(heading, loc="left", weight="bold", parse_math=False)
        axes.set_xticks([])
        axes.margins(x=0.18)

    with style.context(["default", {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                                    "axes.spines.bottom": False}]):  # fmt: skip
        figure = Figure(figsize=(9, 6), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(max(len(memory), 1), max(len(seconds), 1)))
        room = "" if available is None else f" of {size(available)} available"
        bars(above, memory, f"{title}: memory at its peak, {size(sum(memory.values()))}{room}", size)
        bars(below, seconds, f"time, {duration(sum(seconds.values()))}", duration)
        write_png(figure, path, key="chart")
