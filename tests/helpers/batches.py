"""Batches of given tokens."""

import numpy as np
from torch import Tensor

from llmtrain.data import Batch, Rows
from llmtrain.objective import Objective
from llmtrain.objective.causal import Causal


def batch_of(
    inputs: Tensor, targets: Tensor, segments: Tensor | None = None, objective: Objective | None = None
) -> Batch:
    """The batch that ``objective``, next-token prediction unless given, makes of rows without padding."""
    rows = Rows(inputs.numpy(), targets.numpy(), None if segments is None else segments.numpy())
    objective = objective or Causal(z_loss=0.0, chunk_tokens=None)
    return objective.collate(rows, np.arange(len(inputs)), 0)
