"""Which sequences of a refused batch were the worst, and where."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.data import IGNORE
from llmtrain.data.sequences import Rows, Sequences
from llmtrain.tokenizer import Tokenizer

MAX_CHARACTERS = 300  # of an excerpt
MAX_PARTS = 8  # that a stretch is divided into
SHORT_STRETCH = 64  # tokens, some 300 characters of English; not divided further

MeanLoss = Callable[[np.ndarray], float]  # of targets (sequence,)


@torch.no_grad()
def find_worst_sequences(
    loss_sum: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    model: nn.Module,
    tokenizer: Tokenizer,
    sequences: Sequences,
    indices: np.ndarray,
    count: int,
    device: torch.device,
    name_target: Callable[[int], str] | None = None,
) -> list[dict[str, Any]]:
    """The ``count`` sequences with the largest mean loss among ``indices``, worst first, as JSON-ready values.

    Each is ``{"sequence": its number, "loss": mean loss a target token, "text": an excerpt}``; a loss that is not
    finite is worse than any other.  The excerpt, at most 300 characters, is of the targets where the loss is largest;
    if it is not finite, where that begins, since attention carries NaN on to all that follows.  Where the targets are
    classes, which ``name_target`` names, it is the beginning of the text, and ``"label"`` is added.

    The losses are those of the weights as they are now, without dropout, in the arithmetic that the caller has set
    (its autocast); no random number is drawn.  Sequences go through the model one at a time, as ``loss_sum`` gives
    but a sum: pass it uncompiled, or the first call compiles it for that shape.
    """

    def mean_loss(rows: Rows, targets: np.ndarray) -> float:
        inputs, wanted = (torch.from_numpy(array).to(device) for array in (rows.inputs, targets[None]))
        segments = None if rows.segments is None else torch.from_numpy(rows.segments).to(device)
        return loss_sum(inputs, wanted, segments).item() / np.count_nonzero(targets != IGNORE)

    was_training = model.training
    model.eval()
    try:
        found = []
        for index in np.unique(indices):  # a batch over the end of an epoch may hold a sequence twice
            rows = sequences.gather(np.array([index]))
            if (rows.targets != IGNORE).any():
                found.append((mean_loss(rows, rows.targets[0]), int(index)))
        found.sort(key=lambda pair: (-_badness(pair[0]), pair[1]))
        examples = []
        for loss, number in found[:count]:
            rows = sequences.gather(np.array([number]))
            example: dict[str, Any] = {"sequence": number, "loss": loss}
            if name_target is not None:
                end = int(np.flatnonzero(rows.targets[0] != IGNORE)[-1])
                text = tokenizer.decode(rows.inputs[0, : end + 1].tolist())
                cut = text[: MAX_CHARACTERS - 1] + "…" if len(text) > MAX_CHARACTERS else text
                example |= {"label": name_target(int(rows.targets[0, end])), "text": cut}
            else:
                worst = _worst_tokens(partial(mean_loss, rows), rows.inputs[0], rows.targets[0])
                example["text"] = f"…{tokenizer.decode(worst.tolist())[: MAX_CHARACTERS - 2]}…"
            examples.append(example)
        return examples
    finally:
        model.train(was_training)


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
            losses.append(_badness(mean_loss(only)))
        places = parts[losses.index(max(losses))]  # the first of equals: where losses cease to be finite
    return np.append(inputs[places[0]], targets[places])


def _badness(loss: float) -> float:
    """The loss for comparisons: what is not finite is the worst."""
    return loss if math.isfinite(loss) else math.inf
