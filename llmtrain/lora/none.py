"""No adapters."""

from dataclasses import dataclass

import torch

from llmtrain.lora import Lora
from llmtrain.model import LanguageModel


@dataclass(frozen=True)
class NoLora(Lora):
    """No adapters: every parameter is trained."""

    def apply(self, model: LanguageModel, generator: torch.Generator) -> None:
        pass
