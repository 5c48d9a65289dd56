"""No adapters."""

from dataclasses import dataclass

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.lora import Lora
from llmtrain.model import LanguageModel


@dataclass(frozen=True)
class NoLora(Lora):
    """No adapters: every parameter is trained."""

    def apply(self, model: LanguageModel, generators: NamedGenerators | None) -> None:
        pass
