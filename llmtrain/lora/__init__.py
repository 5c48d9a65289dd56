"""Low-rank adapters: a few new weights are trained beside those of the model, which stay as they are."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from llmtrain.base.options import Option
from llmtrain.model import LanguageModel


class Lora(Option, ABC):
    """Contract of ``lora=...``: called once the weights are loaded, before the optimizer is built."""

    adapts: ClassVar[bool] = False  # whether the model's own weights stay as they are, and come from elsewhere

    @abstractmethod
    def apply(self, model: LanguageModel, generator: torch.Generator) -> None:
        """Add adapters to ``model`` in place and freeze what is not to be trained.

        ``generator`` gives their initial values: the same ones each time that a run starts or goes on.  Raises
        ValueError for a key that does not fit the model.
        """


def count_parameters(model: LanguageModel) -> tuple[int, int]:
    """How many parameters of ``model`` are trained, and how many it has: adapters too, vocabulary padding not."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in model.state_dict().items()}
    named = dict(model.named_parameters())  # shared ones once
    trained = sum(sizes[name] for name, parameter in named.items() if parameter.requires_grad)
    return trained, sum(sizes[name] for name in named)
