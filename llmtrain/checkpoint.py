"""When checkpoints are written, which are kept, and how a run comes back from one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.checks import non_negative
from llmtrain.model import LanguageModel
from llmtrain.optimizer.state import load_state_tensors
from llmtrain.state import TrainState
from llmtrain.storage import (
    MODEL,
    OPTIMIZER,
    CheckpointError,
    read_state,
    read_tensors,
    step_of,
    verify_checkpoint,
)
from llmtrain.weights.checkpoint import load_model

SHORT_SAVE = 1.0  # seconds: such a save is made ahead of every evaluation
MAX_SHARE = 0.1  # of the training since the save before, that a longer one ahead of an evaluation may take


@dataclass(frozen=True)
class Checkpoint:
    """The ``checkpoint`` group."""

    every_steps: int
    every_minutes: float
    before_evaluation: bool
    asynchronous: bool
    keep_last: int
    keep_best: int
    keep_every: int
    step: int | None

    def __post_init__(self) -> None:
        non_negative(
            every_steps=self.every_steps,
            every_minutes=self.every_minutes,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            keep_every=self.keep_every,
            step=self.step,
        )

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether to save after ``step`` steps, ``seconds`` after the last save."""
        by_steps = self.every_steps > 0 and step % self.every_steps == 0
        return by_steps or 0 < 60 * self.every_minutes <= seconds

    def is_due_ahead(self, trained: float, cost: float) -> bool:
        """Whether to save ahead of an evaluation, ``trained`` seconds of training after a save that took ``cost``.

        What an evaluation could lose is that training.  ``cost`` is 0 where none has been made yet.
        """
        return self.before_evaluation and (cost < SHORT_SAVE or cost <= MAX_SHARE * trained)

    def kept(self) -> int:
        """How many checkpoints are on the disk in the long run, apart from those of ``keep_every``; at least 1."""
        return max(self.keep_last, 1) + self.keep_best

    def superfluous(self, steps: Sequence[int], standings: Mapping[int, Any]) -> set[int]:
        """Which of the whole checkpoints at ``steps`` need not be kept.

        ``standings``: of what was evaluated by step, the least being the best.  ``keep_last=0`` keeps all.
        """
        if not self.keep_last:
            return set()
        kept = set(sorted(steps)[-self.keep_last :])
        judged = sorted((standings[step], step) for step in steps if step in standings)
        kept |= {step for _, step in judged[: self.keep_best]}
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        return set(steps) - kept


def restore(
    path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, *, fresh_optimizer: bool = False
) -> TrainState:
    """Fill ``model`` and ``optimizer`` from the checkpoint at ``path`` and return the state.

    With ``fresh_optimizer`` the optimizer keeps the state that it has: it is another one than the checkpoint's.
    Everything is checked against the manifest first.  Raises :class:`CheckpointError` naming the file.
    """
    verify_checkpoint(path)
    load_model(model, path / MODEL)
    try:
        if not fresh_optimizer:
            load_state_tensors(optimizer, read_tensors(path / OPTIMIZER))
        return TrainState.from_json(read_state(path))
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def newest_whole(
    checkpoints: Sequence[Path], *, at_most: int | None = None, known: Collection[Path] = ()
) -> tuple[Path | None, list[CheckpointError]]:
    """The newest of ``checkpoints`` that agrees with its manifest, and what is wrong with those passed over.

    ``at_most`` leaves out later steps; those in ``known`` are whole already.  None where there is no whole one.
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
