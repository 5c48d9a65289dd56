"""The losses of a model on a split of the data."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llmtrain.data.batch import Collate
from llmtrain.data.sequences import Sequences
from llmtrain.objective import TrainingUnit, weighted
from llmtrain.precision import Precision


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation."""

    loss: float  # weighted sum of ``losses``
    losses: dict[str, float] = field(default_factory=dict)  # by name, each a mean over its targets
    counted: Tensor | None = None  # the sum of the counts of ``TrainingUnit.score``


@torch.no_grad()
def evaluate(
    unit: TrainingUnit,
    sequences: Sequences,
    collate: Collate,
    *,
    batch_size: int,
    max_sequences: int | None,
    precision: Precision,
    device: torch.device,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """Evaluate the first ``max_sequences`` of ``sequences`` (None: all), without dropout.

    The sequences, their order and their batches of ``batch_size`` are the same every time; the position of a sequence
    is its number.  No random number is drawn from a global generator.  Returns None if ``stop()`` became true.
    """
    end = len(sequences) if max_sequences is None else min(len(sequences), max_sequences)
    numbers = sequences.alike(np.arange(end))
    totals: dict[str, Tensor] = {}
    targets: dict[str, float] = {}
    counted: Tensor | None = None
    was_training = unit.training
    unit.eval()
    try:
        with precision.autocast():  # around all batches: the weights are cast once
            for start in range(0, end, batch_size):
                if stop():
                    return None
                part = numbers[start : start + batch_size]
                batch = collate(sequences.gather(part), part, seed).to(device)
                with (
                    nullcontext() if len(part) == batch_size else unit.eager()
                ):  # the last batch may be smaller: not compiled for that
                    sums, counts = unit.score(unit.fit_shape(batch))
                for name, total in sums.items():
                    totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64, device=device)) + total
                    targets[name] = targets.get(name, 0) + batch.counts[name]
                if counts is not None:
                    counted = counts if counted is None else counted + counts
    finally:
        unit.train(was_training)
    losses = {name: total.item() / (targets[name] or 1) for name, total in totals.items()}
    return EvalResult(weighted(losses, unit.loss_weights) if losses else 0.0, losses, counted)
