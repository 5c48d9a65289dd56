"""Loss on a split of the data, without training on it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.data import IGNORE
from llmtrain.data.sequences import Sequences
from llmtrain.precision import Precision


@torch.no_grad()
def evaluate(
    loss_sum: Callable[[Tensor, Tensor], Tensor],
    plain_loss_sum: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    sequences: Sequences,
    *,
    batch_size: int,
    max_sequences: int | None,
    precision: Precision,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss a target token over the first ``max_sequences`` of ``sequences`` (None: all), without dropout.

    The same sequences in the same order every time, ``batch_size`` at once.  Draws no random number.  Returns None
    if ``stop`` asked to leave off.
    """
    end = len(sequences) if max_sequences is None else min(len(sequences), max_sequences)
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets_seen = 0
    was_training = model.training
    model.eval()
    try:
        with precision.autocast():  # around all batches: the weights are cast once
            for start in range(0, end, batch_size):
                if stop():
                    return None
                inputs, targets = sequences.gather(np.arange(start, min(start + batch_size, end)))
                targets_seen += int((targets != IGNORE).sum())
                of_batch = loss_sum if len(inputs) == batch_size else plain_loss_sum  # not compiled for what is left
                total += of_batch(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
    finally:
        model.train(was_training)
    return total.item() / max(targets_seen, 1)
