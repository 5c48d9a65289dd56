"""The display of a run: live on a terminal, plain lines elsewhere, and always ``train.log``.

Everything shown is a rich ``Text``, never a markup string, and whatever comes from outside (generated text, prompts,
names, paths) goes through ``format.visible`` first, which shows the characters that a terminal would obey.
"""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from rich.console import RenderableType
from rich.text import Text

from llmtrain.base.files import AppendedFile
from llmtrain.base.format import visible
from llmtrain.base.run_files import LOG
from llmtrain.display import lines
from llmtrain.display.progress import Progress
from llmtrain.metrics import Row


class Display(AbstractContextManager["Display"], ABC):
    """A run's display.  A context manager: leaving it, also by an exception, gives the terminal back.

    :meth:`close` may be called from a signal handler, and more than once.
    """

    def __init__(self, run_dir: Path, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_dir = run_dir
        self._stream = stream
        self.progress = Progress(clock)
        self._log = AppendedFile(run_dir / LOG)

    def header(self, rows: list[tuple[str, str]]) -> None:
        """Show what is about to be trained, as (name, value) pairs."""
        self._emit(lines.header(rows))

    def start(self, step: int, max_steps: int) -> None:
        """Begin training: ``step`` steps are done, ``max_steps`` is the end."""
        self.progress.start(step, max_steps)

    def step(self, step: int) -> None:
        """Record that ``step`` steps have left the host.  Called at each step, so it draws nothing."""
        self.progress.advance(step)

    def row(self, row: Row) -> None:
        """Show a train row of the metrics."""
        self._emit(lines.train(row, self.progress))

    def validation(self, row: Row) -> None:
        """Show a validation row of the metrics."""
        self._emit(lines.validation(row, self.progress))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a sample: ``text`` is the model's continuation of ``prompt``."""
        self._emit(lines.sample_title(step, self.progress))
        self._emit(lines.indented(lines.sample(prompt, text)))

    def event(self, row: Row) -> None:
        self._emit(lines.event(row, self.progress))

    def warn(self, text: str) -> None:
        self._emit(lines.warning(text))

    def note(self, text: str) -> None:
        """Show a line that asks for nothing; "": nothing."""
        if text:
            self._emit(Text(visible(text)))

    def summary(self, summary: Row) -> None:
        """Show the end of the run, from the keys of ``summary.json``."""
        self._emit(lines.summary(summary, self.run_dir))

    def notify(self, text: str) -> bool:
        """Show ``text`` without delay if the display can do so from a signal handler; return whether it can."""
        return False

    def close(self) -> None:
        """Give the terminal back and close the log."""
        self._log.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _emit(self, text: Text, drawn: RenderableType | None = None) -> None:
        """Log ``text`` and show it; ``drawn`` is its form on a terminal, where that differs.

        If the reader is gone (a closed pipe or terminal), the run continues and writes only to the log.
        """
        self._write_log(text)
        try:
            self._show(text, drawn)
        except OSError as error:
            self._silence()
            self._write_log(lines.warning(f"the output cannot be written ({error}); messages go to train.log alone"))

    def _write_log(self, text: Text) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.append("".join(f"{now}  {line}".rstrip() + "\n" for line in text.plain.split("\n")))

    @abstractmethod
    def _show(self, text: Text, drawn: RenderableType | None) -> None:
        """Show ``text`` (one or more lines, without the last newline), or ``drawn``."""

    def _silence(self) -> None:
        """Discard all further output, and what is still in a buffer and would fail when Python exits."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


class PlainDisplay(Display):
    """One line per message, without control codes or wrapping: for pipes, files, CI and notebooks."""

    def _show(self, text: Text, drawn: RenderableType | None) -> None:
        encoding = self._stream.encoding or "utf-8"
        plain = text.plain.encode(encoding, errors="backslashreplace").decode(encoding)
        self._stream.write(plain + "\n")
        self._stream.flush()


def open_display(run_dir: Path, stream: TextIO | None = None) -> Display:
    """Open the display on ``stream`` (default: stdout): live if it is a terminal that can be drawn on, else plain."""
    from llmtrain.display.live import LiveDisplay, can_draw

    stream = stream or sys.stdout
    return LiveDisplay(run_dir, stream) if can_draw(stream) else PlainDisplay(run_dir, stream)
