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
    part: tuple[int, int] = (0, 1),
    summed: Callable[[Tensor], Tensor] | None = None,
    casts_once: bool = True,
) -> EvalResult | None:
    """Evaluate the first ``max_sequences`` of ``sequences`` (None: all), without dropout.

    The sequences, their order and their batches of ``batch_size`` are the same every time; the position of a sequence
    is its number.  A thread makes the batches ahead, and the host waits for the device at the end alone.  No random
    number is drawn from a global generator.  Returns None if ``stop()`` became true.

    With several ranks this one evaluates the share ``part`` (its number, how many there are), and ``summed`` sums a
    tensor over the shares; None with one process.  All make equally many forward passes and have the same result;
    ``stop`` must give them the same answers.  ``casts_once``: weights are cast for all passes, and not for each, as
    those that are gathered for a pass have to be.
    """
    end = len(sequences) if max_sequences is None else min(len(sequences), max_sequences)
    numbers = sequences.alike(np.arange(end))
    rank, ranks = part
    passes = -(-len(numbers[::ranks]) // batch_size)  # of the first rank, which has the most
    numbers = numbers[rank::ranks]
    is_short = -(-len(numbers) // batch_size) < passes  # by a pass, whose sequence does not count
    numbers = np.append(numbers, 0) if is_short else numbers
    loader = EvaluationLoader(sequences, numbers, collate, seed=seed, batch_size=batch_size, device=device)
    totals: dict[str, Tensor] = {}
    targets: dict[str, float] = {}
    counted: Tensor | None = None
    was_training = unit.training
    unit.eval()
    try:
        with loader, precision.autocast() if casts_once else nullcontext():
            for number, batch in enumerate(loader, start=1):
                if stop():
                    return None
                is_whole = batch.sequences == batch_size  # the last batch may be smaller: not compiled for that
                with nullcontext() if is_whole else unit.eager(), nullcontext() if casts_once else precision.autocast():
                    sums, counts = unit.score(unit.fit_shape(batch))
                if counts is not None and counted is None:
                    counted = torch.zeros_like(counts)
                for name in (name for name in sums if name not in totals):
                    totals[name], targets[name] = torch.zeros((), dtype=torch.float64, device=device), 0
                if is_short and number == passes:
                    break
                for name, total in sums.items():
                    totals[name] += total
                    targets[name] += batch.counts[name]
                if counts is not None and counted is not None:
                    counted = counted + counts
    finally:
        unit.train(was_training)
    if not totals:
        return EvalResult(0.0)
    names, sums_read, counts_read = list(totals), torch.stack(list(totals.values())), list(targets.values())
    if summed is not None:
        both = torch.stack([sums_read, torch.tensor(counts_read, dtype=torch.float64, device=device)])
        sums_read, counted_targets = summed(both).unbind()
        counts_read = counted_targets.tolist()
    losses = {
        name: total / (count or 1) for name, total, count in zip(names, sums_read.tolist(), counts_read, strict=True)
    }
    if counted is not None:
        counted = (counted if summed is None else summed(counted)).cpu()
    return EvalResult(weighted(losses, unit.loss_weights), losses, counted)
