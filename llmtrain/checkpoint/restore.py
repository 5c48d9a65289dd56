"""Reading a checkpoint back into a model and an optimizer."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from llmtrain.base.run_files import MODEL, OPTIMIZER
from llmtrain.base.tensor_files import CheckpointError, read_tensors
from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.format import read_state, verify_checkpoint
from llmtrain.checkpoint.model_state import restore_model
from llmtrain.checkpoint.optimizer_state import load_state_tensors
from llmtrain.objective import TrainingUnit


def restore(
    path: Path, unit: TrainingUnit, optimizer: torch.optim.Optimizer, *, fresh_optimizer: bool = False
) -> dict[str, Any]:
    """Fill ``unit`` and ``optimizer`` from the checkpoint at ``path`` and return the content of its state file.

    The caller has compared the checkpoint with its manifest.  With ``fresh_optimizer`` the optimizer keeps its own
    state.  Raises :class:`CheckpointError` naming the file.
    """
    restore_model(unit, path / MODEL)
    try:
        if not fresh_optimizer:
            load_state_tensors(optimizer, read_tensors(path / OPTIMIZER))
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    return read_state(path)


def newest_intact(
    checkpoints: Sequence[Path], *, at_most: int | None = None, known: Collection[Path] = ()
) -> tuple[Path | None, list[CheckpointError]]:
    """The newest of ``checkpoints`` that agrees with its manifest, and the errors of the newer ones.

    ``at_most`` leaves out later steps; those in ``known`` are known to be intact.  None if no checkpoint is intact.
    """
    damaged: list[CheckpointError] = []
    for path in sorted(checkpoints, reverse=True):
        if at_most is not None and step_of(path) > at_most:
            continue
        try:
            if path not in known:
                verify_checkpoint(path)
            return path, damaged
        except CheckpointError as error:
            damaged.append(error)
    return None, damaged
