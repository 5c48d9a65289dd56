"""Which sequences of a refused batch were the worst, and where."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.data import IGNORE
from llmtrain.data.sequences import Sequences
from llmtrain.tokenizer import Tokenizer

MAX_CHARACTERS = 300  # of an excerpt
MAX_PARTS = 8  # that a stretch is divided into
SHORT_STRETCH = 64  # tokens, some 300 characters of English; not divided further

MeanLoss = Callable[[np.ndarray, np.ndarray], float]  # (inputs, targets), each (sequence,)


@torch.no_grad()
def find_offenders(
    loss_sum: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    tokenizer: Tokenizer,
    sequences: Sequences,
    indices: np.ndarray,
    count: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The ``count`` sequences with the largest mean loss among ``indices``, worst first, as JSON-ready values.

    Each is ``{"sequence": its number, "loss": mean loss a target token, "text": an excerpt}``; a loss that is not
    finite is worse than any other.  The excerpt, at most 300 characters, is of the targets where the loss is largest;
    if it is not finite, where that begins, since attention carries NaN on to all that follows.

    The losses are those of the weights as they are now, without dropout, in the arithmetic that the caller has set
    (its autocast); no random number is drawn.  Sequences go through the model one at a time, as ``loss_sum`` gives
    but a sum: pass it uncompiled, or the first call compiles it for that shape.
    """

    def mean_loss(inputs: np.ndarray, targets: np.ndarray) -> float:
        total = loss_sum(torch.from_numpy(inputs[None]).to(device), torch.from_numpy(targets[None]).to(device))
        return total.item() / np.count_nonzero(targets != IGNORE)

    was_training = model.training
    model.eval()
    try:
        found = []
        for index in np.unique(indices):  # a batch over the end of an epoch may hold a sequence twice
            inputs, targets = _sequence(sequences, index)
            if (targets != IGNORE).any():
                found.append((mean_loss(inputs, targets), int(index)))
        found.sort(key=lambda pair: (-_badness(pair[0]), pair[1]))
        offenders = []
        for loss, number in found[:count]:
            worst = _worst_tokens(mean_loss, *_sequence(sequences, number))
            text = tokenizer.decode(worst.tolist())[: MAX_CHARACTERS - 2]
            offenders.append({"sequence": number, "loss": loss, "text": f"…{text}…"})
        return offenders
    finally:
        model.train(was_training)


def _sequence(sequences: Sequences, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one sequence, each ``(sequence,)``."""
    inputs, targets = sequences.gather(np.array([index]))
    return inputs[0], targets[0]


def _worst_tokens(mean_loss: MeanLoss, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The targets of the stretch, of some 32 to 64 of them, whose loss is worst, and the input just before.

    It is a part of the sequence's worst part, and so on; the input is what the first of the losses follows from.
    """
    places = np.flatnonzero(targets != IGNORE)
    while len(places) > SHORT_STRETCH:
        parts = np.array_split(places, min(MAX_PARTS, 2 * len(places) // SHORT_STRETCH))
        losses = []
        for part in parts:
            only = np.full_like(targets, IGNORE)
            only[part] = targets[part]
            losses.append(_badness(mean_loss(inputs, only)))
        places = parts[losses.index(max(losses))]  # the first of equals: where losses cease to be finite
    return np.append(inputs[places[0]], targets[places])


def _badness(loss: float) -> float:
    """The loss for comparisons: what is not finite is the worst."""
    return loss if math.isfinite(loss) else math.inf
