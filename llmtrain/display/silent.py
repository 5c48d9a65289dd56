"""The display of the ranks that show nothing."""

import io
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from llmtrain.display import Display


class SilentDisplay(Display):
    """A display that shows and logs nothing: rank 0 does."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, io.StringIO())

    def _emit(self, text: Text, drawn: RenderableType | None = None) -> None:
        pass

    def _show(self, text: Text, drawn: RenderableType | None) -> None:
        pass
