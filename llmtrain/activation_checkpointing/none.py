"""No recomputation: everything that backward needs is kept."""

from dataclasses import dataclass

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.model import LanguageModel


@dataclass(frozen=True)
class KeepAll(ActivationCheckpointing):
    """The fastest option, and the one that takes the most memory."""

    def apply(self, model: LanguageModel) -> None:
        pass
