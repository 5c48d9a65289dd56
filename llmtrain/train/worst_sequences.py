"""The sequences of a skipped step with the largest losses, and the place in each where the loss is largest."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from llmtrain.data import IGNORE
from llmtrain.data.loader import TrainingStream
from llmtrain.data.sequences import Rows
from llmtrain.objective import TrainingUnit, mean_losses
from llmtrain.tokenizer import Tokenizer

MAX_CHARACTERS = 300  # of an excerpt
MAX_PARTS = 8  # that a stretch is divided into
SHORT_STRETCH = 64  # tokens, some 300 characters of English; not divided further

MeanLoss = Callable[[np.ndarray], float]  # of targets (sequence,)


@torch.no_grad()
def find_worst_sequences(
    unit: TrainingUnit,
    tokenizer: Tokenizer,
    stream: TrainingStream,
    position: int,
    numbers: np.ndarray,
    shown: int,
    name_target: Callable[[int], str] | None = None,
) -> list[dict[str, Any]]:
    """The ``shown`` sequences with the largest mean loss among ``numbers``, worst first.

    They are the sequences at the positions from ``position`` on.

    Each is ``{"sequence": its number, "loss": mean loss a target token, "text": an excerpt}``, ready for JSON; a loss
    that is not finite is worse than any other.  The excerpt, at most 300 characters, shows the targets with the
    largest loss, or the first with a loss that is not finite, since attention carries NaN on to all later tokens.  If
    the targets are classes, which ``name_target`` names, it is the beginning of the text, and ``"label"`` is added.

    The losses are those of the weights as they are now, without dropout, in the arithmetic that the caller has set
    (its autocast); no random number is drawn.  Sequences go through the unit one at a time, not compiled.
    """

    def mean_loss(rows: Rows, at: int, targets: np.ndarray) -> float:
        only = rows._replace(targets=targets[None])
        batch = stream.collate(only, np.array([at]), stream.seed).to(stream.device)
        return float(mean_losses(unit, batch)[0])

    was_training = unit.training
    unit.eval()
    try:
        with unit.eager():
            found = []
            for number, first in zip(*np.unique(numbers, return_index=True), strict=True):  # an epoch's end: twice
                rows = stream.sequences.gather(np.array([number]))
                if (rows.targets != IGNORE).any():
                    at = position + int(first)
                    found.append((mean_loss(rows, at, rows.targets[0]), int(number), at))
            found.sort(key=lambda each: (-_badness(each[0]), each[1]))
            worst = []
            for loss, number, at in found[:shown]:
                rows = stream.sequences.gather(np.array([number]))
                entry: dict[str, Any] = {"sequence": number, "loss": loss}
                if name_target is not None:
                    end = int(np.flatnonzero(rows.targets[0] != IGNORE)[-1])
                    text = tokenizer.decode(rows.inputs[0, : end + 1].tolist())
                    cut = text[: MAX_CHARACTERS - 1] + "…" if len(text) > MAX_CHARACTERS else text
                    entry |= {"label": name_target(int(rows.targets[0, end])), "text": cut}
                else:
                    tokens = _worst_tokens(partial(mean_loss, rows, at), rows.inputs[0], rows.targets[0])
                    entry["text"] = f"…{tokenizer.decode(tokens.tolist())[: MAX_CHARACTERS - 2]}…"
                worst.append(entry)
            return worst
    finally:
        unit.train(was_training)


def _worst_tokens(mean_loss: MeanLoss, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The stretch of some 32 to 64 targets with the worst loss, after the input of the first of them.

    The sequence is divided, then its worst part, and so on.
    """
    places = np.flatnonzero(targets != IGNORE)
    while len(places) > SHORT_STRETCH:
        parts = np.array_split(places, min(MAX_PARTS, 2 * len(places) // SHORT_STRETCH))
        losses = []
        for part in parts:
            only = np.full_like(targets, IGNORE)
            only[part] = targets[part]
            losses.append(_badness(mean_loss(only)))
        places = parts[losses.index(max(losses))]  # the first of equals: the one where losses cease to be finite
    return np.append(inputs[places[0]], targets[places])


def _badness(loss: float) -> float:
    """The loss for comparisons: one that is not finite is the worst."""
    return loss if math.isfinite(loss) else math.inf
