"""The checkpoints of a run directory, by step."""

import re
from pathlib import Path

from llmtrain.base.run_files import CHECKPOINTS, CONFIG, MANIFEST
from llmtrain.base.tensor_files import CheckpointError


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first."""
    folders = (run_dir / CHECKPOINTS).glob("step-*")
    return sorted(path for path in folders if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def locate_checkpoint(target: Path) -> Path:
    """The checkpoint that ``target`` names: itself, or the newest of a run directory.  Raises CheckpointError."""
    if (target / MANIFEST).is_file():
        return target
    if checkpoints := find_checkpoints(target):
        return checkpoints[-1]
    if not target.exists():
        raise CheckpointError(f"{target}: no such directory")
    if (target / CONFIG).is_file():
        raise CheckpointError(f"{target}: this run has no checkpoint yet")
    if (target / "config.json").is_file():
        raise CheckpointError(
            f"{target}: a model in Hugging Face's form, for transformers; a run starts from it with "
            f"weights=huggingface weights.path={target}, and is what this verb takes"
        )
    raise CheckpointError(
        f"{target}: neither a run directory (no {CONFIG}) nor a checkpoint (no {MANIFEST}){newest_run_in(target)}"
    )


def newest_run_in(folder: Path) -> str:
    """The end of a message about a folder that is no run: the newest run in it."""
    runs = [path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{CONFIG}")]
    if not runs:
        return ""
    return f"; the newest run in it is {max(runs, key=lambda run: (run / CONFIG).stat().st_mtime)}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])
