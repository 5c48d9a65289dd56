"""A plugin for tests: next-token prediction whose loss is NaN wherever the marker stands in a sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.model import LanguageModel
from llmtrain.objective.causal import Causal

MARKER = b"<<planted NaN>>"


@dataclass(frozen=True)
class Poisonable(Causal):
    """``Causal``, and NaN for the marker, as an overflow in one layer would give it."""

    def __call__(self, model: LanguageModel, inputs: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        loss = super().__call__(model, inputs, targets, segments)
        marker = torch.tensor(list(MARKER), device=inputs.device)
        found = (inputs.unfold(1, len(marker), 1) == marker).all(-1).any()
        return torch.where(found, torch.nan, loss)
