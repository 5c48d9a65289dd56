"""PNG files, complete or absent.  Matplotlib is slow to import, so only functions that draw import it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_png(figure: Figure, path: Path) -> None:
    """Save as PNG; a reader sees the old file or the new one, never a part."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # a link of this name would be written through
        FigureCanvasAgg(figure).print_png(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
