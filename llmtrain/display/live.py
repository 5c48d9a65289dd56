"""The display on a terminal: progress and the latest numbers stay at the bottom, messages scroll above them."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.live_render import LiveRender
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from llmtrain.base import format
from llmtrain.base.format import visible
from llmtrain.display import Display, lines
from llmtrain.display.progress import Progress
from llmtrain.metrics import Row
from llmtrain.metrics.smoothing import EMA

CELL_WIDTH = 19  # "grad norm 1.23e+04" and a space


def _console(stream: TextIO) -> Console:
    return Console(file=stream, markup=False, highlight=False, emoji=False)


def can_draw(stream: TextIO) -> bool:
    """Return whether ``stream`` is a terminal that moves its cursor and shows Unicode."""
    console = _console(stream)
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")


class LiveDisplay(Display):
    """A display that rich's thread redraws four times a second, so that the clock also runs during a long step."""

    def __init__(self, run_dir: Path, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(run_dir, stream, clock)
        self._console = _console(stream)
        self._latest: Row = {}
        self._smoothed = EMA()
        self._smoothed_loss: float | None = None
        self._val_loss: float | None = None
        self._notice = ""
        self._live = Live(console=self._console, get_renderable=self._panel, transient=True)
        self._live._live_render = _ReflowingRender("")  # rich offers no argument for it

    def header(self, rows: list[tuple[str, str]]) -> None:
        """Show names and values; long values wrap within their column."""
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(Text(visible(name), style="dim"), Text(visible(value)))
        self._emit(lines.header(rows), table)

    def start(self, step: int, max_steps: int) -> None:
        super().start(step, max_steps)
        self._or_silence(lambda: self._live.start(refresh=True))

    def row(self, row: Row) -> None:
        """Update the numbers at the bottom; only the log gets a line."""
        self._write_log(lines.train(row, self.progress))
        self._latest = row
        average = self._smoothed.update(row["loss"])
        self._smoothed_loss = None if math.isnan(average) else average

    def validation(self, row: Row) -> None:
        """Show a line above, and the loss at the bottom."""
        self._val_loss = row["val_loss"]
        super().validation(row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a sample, wrapped at words and indented."""
        sample = lines.sample(prompt, text)
        self._emit(lines.sample_title(step, self.progress))
        wrapped = sample.wrap(self._console, max(self._console.width - 8, 20))
        self._emit(lines.indented(sample), lines.indented(Text("\n").join(wrapped)))

    def summary(self, summary: Row) -> None:
        """Remove the live part and show the summary."""
        self._or_silence(self._live.stop)
        super().summary(summary)

    def notify(self, text: str) -> bool:
        """Show ``text`` with the next drawing; a line written to the terminal would be drawn over."""
        if not self._live.is_started:
            return False
        self._notice = text
        return True

    def close(self) -> None:
        """Stop drawing and show the cursor again."""
        self._or_silence(self._live.stop)
        super().close()

    def _show(self, text: Text, drawn: RenderableType | None) -> None:
        if drawn is None:
            self._console.print(text, soft_wrap=True)  # the terminal wraps, so that a path or command copies whole
        else:
            self._console.print(drawn)

    def _or_silence(self, draw: Callable[[], None]) -> None:
        """Call ``draw``; a closed terminal must not end the run."""
        try:
            draw()
        except OSError:
            self._silence()

    def _panel(self) -> RenderableType:
        return Group(
            Rule(Text(visible(self.run_dir.name), style="bold"), align="left", style="dim"),
            _ProgressLine(self.progress),
            _Cells(self._cells()),
            *([Text(visible(self._notice), "bold yellow")] if self._notice else []),
        )

    def _cells(self) -> list[tuple[str, Text]]:
        row = self._latest
        clipped = "yellow" if row.get("clipped") else ""
        cells: list[tuple[str, Any, Callable[[Any], str], str]] = [
            ("loss", row.get("loss"), format.loss, ""),
            ("smoothed", self._smoothed_loss, format.loss, ""),
            ("val loss", self._val_loss, format.loss, ""),
            ("lr", row.get("learning_rate"), format.learning_rate, ""),
            ("grad norm", row.get("grad_norm"), format.significant, clipped),
            ("tok/s", row.get("tokens_per_second"), format.count, ""),
            ("mfu", row.get("mfu"), format.percent, ""),
            ("memory", row.get("memory_bytes"), format.size, ""),
        ]
        return [
            (label, Text("-", "dim") if value is None else Text(show(value), lines.loss_style(value) or style))
            for label, value, show, style in cells
        ]


class _ProgressLine:
    """The progress bar and its figures, on one line or on two where there is little room."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        progress = self.progress
        left = progress.remaining_seconds
        figures = Text("  ").join(
            [
                Text(progress.label(progress.current), "bold"),
                Text(format.percent(progress.current / max(progress.max_steps, 1))),
                Text(format.duration(round(progress.elapsed_seconds)), "dim"),
                Text("- left" if left is None else f"{format.duration(round(left))} left", "cyan"),
            ]
        )
        room = options.max_width - figures.cell_len - 2
        below = room < 16
        bar = ProgressBar(
            total=max(progress.max_steps, 1), completed=progress.current, width=options.max_width if below else room
        )
        line = Table.grid(padding=(0, 2))
        if below:
            figures.truncate(options.max_width)
            line.add_row(figures)
            line.add_row(bar)
        else:
            line.add_row(bar, figures)
        yield line


class _Cells:
    """Labelled values in as many even columns as fit."""

    def __init__(self, cells: list[tuple[str, Text]]) -> None:
        self.cells = cells

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = max(1, min(options.max_width // CELL_WIDTH, len(self.cells)))
        num_rows = math.ceil(len(self.cells) / fitting)
        num_columns = math.ceil(len(self.cells) / num_rows)
        width = min(options.max_width // num_columns, CELL_WIDTH + 4)
        line = Text(no_wrap=True, overflow="crop")
        for index, (label, value) in enumerate(self.cells):
            if index and index % num_columns == 0:
                yield line
                line = Text(no_wrap=True, overflow="crop")
            cell = Text.assemble((f"{label:<10}", "dim"), value)
            cell.truncate(width, pad=True)
            line.append_text(cell)
        yield line


class _ReflowingRender(LiveRender):
    """A renderer that finds the top of its last drawing even after the terminal has become narrower.

    rich moves up by the number of lines that it wrote, but a narrower terminal wraps them into more lines, and each
    redraw would leave the surplus behind.
    """

    _console: Console | None = None
    _line_widths: list[int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments = [segment for segment in super().__rich_console__(console, options) if isinstance(segment, Segment)]
        self._console = console
        self._line_widths = [Segment.get_line_length(line) for line in Segment.split_lines(segments)]
        yield from segments

    def position_cursor(self) -> Control:
        """Move to the first column of the first row of the last drawing."""
        if self._console is not None:
            width = max(self._console.width, 1)
            self._shape = width, sum(max(1, math.ceil(line / width)) for line in self._line_widths)
        return super().position_cursor()
