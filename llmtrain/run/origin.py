"""Settings of a new run that are those of an earlier one: ``llmtrain train --from RUN_DIR``."""

import json
import os
from pathlib import Path
from typing import Any

from llmtrain.base.run_files import CONFIG, MANIFEST, SUMMARY
from llmtrain.config.compose import compose
from llmtrain.run.stored_run import StoredRun


def settings_of(place: Path) -> dict[str, Any]:
    """The config of the run at ``place``, a checkpoint of it, or the best job of a sweep, for a new run.

    A new run has its own directory; where runs and caches are kept is not taken over.  Raises ValueError for a place
    that holds no run.
    """
    settings = StoredRun(run_at(place)).completed
    own = compose("train", [])
    data = {**settings["data"], **({"cache_dir": own["data"]["cache_dir"]} if "cache_dir" in settings["data"] else {})}
    return settings | {"run_dir": None, "output_dir": own["output_dir"], "data": data}


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
        values = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    loss = values.get("best_val_loss") if isinstance(values, dict) and values.get("exit_reason") == "finished" else None
    return loss if isinstance(loss, float) else None
