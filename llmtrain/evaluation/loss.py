"""The losses of a model on a split of the data."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llmtrain.data.batch import Collate
from llmtrain.data.loader import EvaluationLoader
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
    is its number.  A thread makes the batches ahead, and the host waits for the device at the end alone.  No random
    number is drawn from a global generator.  Returns None if ``stop()`` became true.
    """
    end = len(sequences) if max_sequences is None else min(len(sequences), max_sequences)
    numbers = sequences.alike(np.arange(end))
    loader = EvaluationLoader(sequences, numbers, collate, seed=seed, batch_size=batch_size, device=device)
    totals: dict[str, Tensor] = {}
    targets: dict[str, float] = {}
    counted: Tensor | None = None
    was_training = unit.training
    unit.eval()
    try:
        with loader, precision.autocast():  # around all batches: the weights are cast once
            for batch in loader:
                if stop():
                    return None
                with (
                    nullcontext() if batch.sequences == batch_size else unit.eager()
                ):  # the last batch may be smaller: not compiled for that
                    sums, counts = unit.score(unit.fit_shape(batch))
                for name, total in sums.items():
                    if name not in totals:
                        totals[name] = torch.zeros((), dtype=torch.float64, device=device)
                    totals[name] += total
                    targets[name] = targets.get(name, 0) + batch.counts[name]
                if counts is not None:
                    counted = counts if counted is None else counted + counts
    finally:
        unit.train(was_training)
    if not totals:
        return EvalResult(0.0)
    read = torch.stack(list(totals.values())).tolist()  # here the host waits
    losses = {name: total / (targets[name] or 1) for name, total in zip(totals, read, strict=True)}
    return EvalResult(weighted(losses, unit.loss_weights), losses, None if counted is None else counted.cpu())
