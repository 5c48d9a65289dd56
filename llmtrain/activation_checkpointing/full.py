"""Recomputation of whole blocks (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost")."""

from dataclasses import dataclass

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.activation_checkpointing.offload import offload
from llmtrain.activation_checkpointing.recompute import recompute
from llmtrain.model import LanguageModel


@dataclass(frozen=True)
class Full(ActivationCheckpointing):
    """Keep the input of each block; backward computes the block again: a third more time, the least memory."""

    offload: bool

    def apply(self, model: LanguageModel) -> None:
        if self.offload:
            offload(model)
        for block in model.blocks:
            recompute(block)
