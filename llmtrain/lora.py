"""Low-rank adapters; so far a run trains all of its weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from llmtrain.model import LanguageModel


class Lora(ABC):
    """Contract of ``lora=...``: called once the weights are loaded, before the optimizer is built."""

    @abstractmethod
    def apply(self, model: LanguageModel) -> None:
        """Add adapters to ``model`` in place and freeze what is not to be trained."""


@dataclass(frozen=True)
class NoLora(Lora):
    """Every parameter is trained."""

    def apply(self, model: LanguageModel) -> None:
        pass
