"""Loss on a split of the data, without training on it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.data import IGNORE
from llmtrain.data.sequences import Sequences
from llmtrain.precision import Precision

LossSum = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (inputs, targets, segments) -> sum of the losses
Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (inputs, targets) -> the same, and what was counted


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation came to."""

    loss: float  # mean over the targets
    counted: Tensor | None = None  # the sum of what was counted besides


@torch.no_grad()
def evaluate(
    loss_sum: LossSum,
    plain_loss_sum: LossSum,
    model: nn.Module,
    sequences: Sequences,
    *,
    batch_size: int,
    max_sequences: int | None,
    precision: Precision,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    score: Score | None = None,
) -> Evaluated | None:
    """Mean loss a target over the first ``max_sequences`` of ``sequences`` (None: all), without dropout.

    The same sequences in the same order every time, ``batch_size`` at once.  Draws no random number.  Returns None
    if ``stop`` asked to leave off.  With ``score`` it is that which is called, and what it counts is added up.
    """
    end = len(sequences) if max_sequences is None else min(len(sequences), max_sequences)
    indices = sequences.alike(np.arange(end))
    total = torch.zeros((), dtype=torch.float64, device=device)
    counted: Tensor | None = None
    targets_seen = 0
    was_training = model.training
    model.eval()
    try:
        with precision.autocast():  # around all batches: the weights are cast once
            for start in range(0, end, batch_size):
                if stop():
                    return None
                rows = sequences.gather(indices[start : start + batch_size])
                targets_seen += int((rows.targets != IGNORE).sum())
                inputs, targets = (torch.from_numpy(array).to(device) for array in rows[:2])
                if score is not None:
                    loss, counts = score(inputs, targets)
                    total += loss
                    counted = counts if counted is None else counted + counts
                    continue
                segments = None if rows.segments is None else torch.from_numpy(rows.segments).to(device)
                of_batch = loss_sum if len(inputs) == batch_size else plain_loss_sum  # not compiled for what is left
                total += of_batch(inputs, targets, segments)
    finally:
        model.train(was_training)
    return Evaluated(total.item() / max(targets_seen, 1), counted)
