"""Recomputation of a part: of some blocks, or of the cheap operations of every block."""

from dataclasses import dataclass
from enum import Enum

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.activation_checkpointing.offload import offload
from llmtrain.activation_checkpointing.recompute import recompute
from llmtrain.activation_checkpointing.selective_ops import recompute_cheap
from llmtrain.base.options import RunFacts
from llmtrain.model import LanguageModel


class By(Enum):
    """Units of the selection."""

    block = "block"  # recompute every n-th block as ``full`` does; the others keep everything
    operation = "operation"  # keep the results of matrix products and attention in every block


@dataclass(frozen=True)
class Selective(ActivationCheckpointing):
    """A compromise between ``none`` and ``full`` in memory and time."""

    by: By
    every: int
    offload: bool

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: must be at least 1, which recomputes every block")

    def apply(self, model: LanguageModel) -> None:
        if self.by is By.block and self.every > len(model.blocks):
            raise ValueError(
                f"every={self.every}: the model has {len(model.blocks)} blocks, so that none would be recomputed; "
                f"take at most {len(model.blocks)}, or activation_checkpointing=none"
            )
        offloader = offload(model) if self.offload else None
        for number, block in enumerate(model.blocks, start=1):
            if self.by is By.operation:
                recompute_cheap(block, offloader)
            elif number % self.every == 0:
                recompute(block)

    def unread(self, run: RunFacts) -> dict[str, str]:
        if self.by is By.block:
            return {}
        return {
            "every": "it counts blocks, but operations are selected, in every block; activation_checkpointing.by=block"
        }
