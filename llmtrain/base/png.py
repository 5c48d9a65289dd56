"""PNG files, complete or absent.  Matplotlib is slow to import, so only functions that draw import it."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmtrain.base.files import written_whole
from llmtrain.base.outputs import open_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_png(figure: Figure, path: Path, *, key: str | None = None) -> None:
    """Save as PNG; a reader sees the old file or the new one, never a part.

    ``key``: that names ``path``, where the user chose it; None: a file of a run, where a link is replaced.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    opened = written_whole(path, binary=True) if key is None else open_output(key, str(path), binary=True)
    file: IO[Any]
    with opened as file:
        FigureCanvasAgg(figure).print_png(file)
