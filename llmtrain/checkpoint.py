"""When checkpoints are written, what is in them, and how a run comes back from one."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.model import LanguageModel
from llmtrain.optimizer.state import load_state_tensors, state_tensors
from llmtrain.run_directory import RunDirectory
from llmtrain.state import TrainState
from llmtrain.storage import (
    MODEL,
    OPTIMIZER,
    CheckpointError,
    read_state,
    read_tensors,
    verify_checkpoint,
    write_checkpoint,
)
from llmtrain.weights.checkpoint import load_model


@dataclass(frozen=True)
class Checkpoint:
    """The ``checkpoint`` group."""

    every_steps: int
    keep_last: int

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"every_steps={self.every_steps}: must be 0 (only at the end) or more")
        if self.keep_last < 0:
            raise ValueError(f"keep_last={self.keep_last}: must be 0 (keep all) or more")

    def is_due(self, step: int) -> bool:
        """Whether to save after ``step`` steps."""
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(
        self, run: RunDirectory, model: LanguageModel, optimizer: torch.optim.Optimizer, state: TrainState, config: str
    ) -> Path:
        """Write a checkpoint of this moment, then remove those that ``keep_last`` no longer keeps.

        Raises OSError (no space, …) with the older checkpoints untouched.
        """
        path = run.checkpoints / f"step-{state.step:08d}"
        write_checkpoint(
            path, model=model.state_dict(), optimizer=state_tensors(optimizer), state=state.to_json(), config=config
        )
        if self.keep_last:
            for old in run.find_checkpoints()[: -self.keep_last]:
                shutil.rmtree(old)
        return path


def restore(path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Fill ``model`` and ``optimizer`` from the checkpoint at ``path`` and return the state.

    Everything is checked against the manifest first.  Raises :class:`CheckpointError` naming the file.
    """
    verify_checkpoint(path)
    load_model(model, path / MODEL)
    try:
        load_state_tensors(optimizer, read_tensors(path / OPTIMIZER))
        return TrainState.from_json(read_state(path))
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: {error}") from error
