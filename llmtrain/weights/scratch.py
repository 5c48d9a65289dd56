"""The model's own initialisation."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.model import LanguageModel
from llmtrain.weights import Weights


@dataclass(frozen=True)
class Scratch(Weights):
    """Nothing to load: the model keeps its initial values."""

    takes_parts: ClassVar[bool] = True

    def load(self, model: LanguageModel) -> None:
        pass
