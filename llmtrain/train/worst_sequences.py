"""The sequences of a skipped step with the largest losses, and the place in each where the loss is largest."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from llmtrain.data import IGNORE
from llmtrain.data.loader import TrainingStream
from llmtrain.data.sequences import Rows
from llmtrain.objective import TrainingUnit, weighted
from llmtrain.tokenizer import Tokenizer
from llmtrain.train.out_of_memory import halve_on_out_of_memory

MAX_CHARACTERS = 300  # of an excerpt
MAX_PARTS = 8  # that a stretch is divided into
SHORT_STRETCH = 64  # tokens, some 300 characters of English; not divided further

MeanLosses = Callable[[Rows, np.ndarray], list[float]]  # of rows and their positions: a mean over each row's targets


@torch.no_grad()
def find_worst_sequences(
    unit: TrainingUnit,
    tokenizer: Tokenizer,
    stream: TrainingStream,
    position: int,
    numbers: np.ndarray,
    shown: int,
    name_target: Callable[[int], str] | None = None,
    *,
    micro_batch_size: int,
) -> list[dict[str, Any]]:
    """The ``shown`` sequences with the largest mean loss among ``numbers``, worst first.

    They are the sequences at the positions from ``position`` on.

    Each is ``{"sequence": its number, "loss": mean loss a target token, "text": an excerpt}``, ready for JSON; a loss
    that is not finite is worse than any other.  The excerpt, at most 300 characters, shows the targets with the
    largest loss, or the first with a loss that is not finite, since attention carries NaN on to all later tokens.  If
    the targets are classes, which ``name_target`` names, it is the beginning of the text, and ``"label"`` is added.

    The losses are those of the weights as they are now, without dropout, in the arithmetic that the caller has set
    (its autocast); no random number is drawn.  ``micro_batch_size`` sequences go through the unit at once, not
    compiled, and fewer where there is no memory for them.
    """

    def mean_losses(rows: Rows, positions: np.ndarray) -> list[float]:
        return halve_on_out_of_memory(lambda size: _mean_losses(unit, stream, rows, positions, size), micro_batch_size)

    was_training = unit.training
    unit.eval()
    try:
        with unit.eager():
            found = _rank(mean_losses, stream, position, numbers) if shown else []
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
                    tokens = _worst_tokens(mean_losses, rows, at)
                    entry["text"] = f"…{tokenizer.decode(tokens.tolist())[: MAX_CHARACTERS - 2]}…"
                worst.append(entry)
            return worst
    finally:
        unit.train(was_training)


def _mean_losses(
    unit: TrainingUnit, stream: TrainingStream, rows: Rows, positions: np.ndarray, micro_batch_size: int
) -> list[float]:
    """The loss of each row over its own targets; the host waits once a micro-batch."""
    counts = [
        stream.collate(_select(rows, [i]), positions[i : i + 1], stream.seed).counts for i in range(len(positions))
    ]
    sums: dict[str, list[float]] = {}
    for part in stream.collate(rows, positions, stream.seed).split(micro_batch_size):
        for name, totals in unit.sequence_losses(part.to(stream.device)).items():
            sums.setdefault(name, []).extend(totals.tolist())
    return [
        float(weighted({name: sums[name][i] / (count[name] or 1) for name in sums}, unit.loss_weights))
        for i, count in enumerate(counts)
    ]


def _select(rows: Rows, indices: Sequence[int]) -> Rows:
    """Those rows, in that order."""
    return Rows(*(None if values is None else values[list(indices)] for values in rows))  # type: ignore[arg-type]


def _rank(
    mean_losses: MeanLosses, stream: TrainingStream, position: int, numbers: np.ndarray
) -> list[tuple[float, int, int]]:
    """Loss, number and position of each sequence that has targets, the worst first."""
    unique, first = np.unique(numbers, return_index=True)  # an epoch's end: a number may come twice
    unique, first = unique[np.argsort(first)], np.sort(first)  # neighbours in the order are of similar length
    rows = stream.sequences.gather(unique)
    has_targets = np.flatnonzero((rows.targets != IGNORE).any(axis=1))
    if not len(has_targets):
        return []
    positions = position + first[has_targets]
    losses = mean_losses(_select(rows, has_targets.tolist()), positions)
    found = list(zip(losses, unique[has_targets].tolist(), positions.tolist(), strict=True))
    return sorted(found, key=lambda each: (-_badness(each[0]), each[1]))


def _worst_tokens(mean_losses: MeanLosses, row: Rows, at: int) -> np.ndarray:
    """The stretch of some 32 to 64 targets with the worst loss, after the input of the first of them.

    ``row``: one sequence, at the position ``at``.  It is divided, then its worst part, and so on.
    """
    targets = row.targets[0]
    places = np.flatnonzero(targets != IGNORE)
    while len(places) > SHORT_STRETCH:
        parts = np.array_split(places, min(MAX_PARTS, 2 * len(places) // SHORT_STRETCH))
        copies = _select(row, [0] * len(parts))
        only = np.full_like(copies.targets, IGNORE)
        for i, part in enumerate(parts):
            only[i, part] = targets[part]
        losses = [_badness(loss) for loss in mean_losses(copies._replace(targets=only), np.full(len(parts), at))]
        places = parts[losses.index(max(losses))]  # the first of equals: the one where losses cease to be finite
    return np.append(row.inputs[0, places[0]], targets[places])


def _badness(loss: float) -> float:
    """The loss for comparisons: one that is not finite is the worst."""
    return loss if math.isfinite(loss) else math.inf
