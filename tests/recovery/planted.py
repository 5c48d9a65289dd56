"""A plugin for tests: next-token prediction whose loss is NaN wherever the marker stands in a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.data import Batch
from llmtrain.model import LanguageModel
from llmtrain.objective.causal import Causal, CausalUnit

MARKER = b"<<planted NaN>>"


class PoisonableUnit(CausalUnit):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        inputs = batch.tensors["inputs"]
        marker = torch.tensor(list(MARKER), device=inputs.device)
        found = (inputs.unfold(1, len(marker), 1) == marker).all(-1).any()
        return {name: torch.where(found, torch.nan, total) for name, total in super().forward(batch).items()}


@dataclass(frozen=True)
class Poisonable(Causal):
    """``Causal``, and NaN for the marker, as an overflow in one layer would give it."""

    def build(
        self,
        model: LanguageModel,
        labels: Sequence[str],
        generator: torch.Generator,
        class_weights: Sequence[float] = (),
    ) -> PoisonableUnit:
        return PoisonableUnit(model, self.loss, self.z_loss, self.chunk_tokens)
