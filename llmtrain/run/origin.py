"""Settings of a new run that are those of an earlier one: ``llmtrain train --from RUN_DIR``."""

import os
from pathlib import Path
from typing import Any

from llmtrain.base.run_files import CONFIG, MANIFEST, SUMMARY, TOKENIZER
from llmtrain.base.run_records import read_summary
from llmtrain.config.compose import compose
from llmtrain.run.stored_run import StoredRun


def settings_of(place: Path) -> dict[str, Any]:
    """The config of the run at ``place``, a checkpoint of it, or the best job of a sweep, for a new run.

    A new run has its own directory; where runs and caches are kept is not taken over.  Its tokenizer is read from the
    first place, or, where that is gone, from the run's copy.  Raises ValueError for a place that holds no run.
    """
    stored = StoredRun(run_at(place))
    settings = stored.completed | {"run_dir": None, "output_dir": compose("train", [])["output_dir"]}
    tokenizer = settings["tokenizer"]
    copy = stored.directory.path / TOKENIZER
    path = tokenizer.get("path") if isinstance(tokenizer, dict) else None
    if isinstance(path, str) and not os.path.lexists(path) and os.path.lexists(copy):
        settings["tokenizer"] = tokenizer | {"path": str(copy)}
    return settings


def run_at(place: Path) -> Path:
    """The run directory that ``place`` names: itself, that of a checkpoint, or of a sweep's best finished job."""
    if os.path.lexists(place / CONFIG):
        run = place.absolute().parent.parent
        return run if (place / MANIFEST).exists() and (run / CONFIG).exists() else place
    jobs = {path.parent: loss for path in sorted(place.glob(f"*/{SUMMARY}")) if (loss := best_loss(path)) is not None}
    return min(jobs, key=lambda job: jobs[job]) if jobs else place


def best_loss(summary: Path) -> float | None:
    """The lowest validation loss of a finished run; None where there is none."""
    try:
        values = read_summary(summary)
    except (OSError, ValueError):
        return None
    return values.get("best_val_loss") if values.get("exit_reason") == "finished" else None
