"""Low-rank adapters: a few new weights are trained, and the model's own weights are frozen."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from llmtrain.base.options import Option
from llmtrain.model import LanguageModel


class Lora(Option, ABC):
    """Contract of ``lora=...``: called once the weights are loaded, before the optimizer is built."""

    adapts: ClassVar[bool] = False  # True if the model's own weights are frozen and come from another checkpoint

    @abstractmethod
    def apply(self, model: LanguageModel, generator: torch.Generator) -> None:
        """Add adapters to ``model`` in place and freeze the parameters that are not trained.

        ``generator`` draws their initial values, the same ones each time that a run starts or resumes.  Raises
        ValueError for a key that does not fit the model.
        """


def count_parameters(model: LanguageModel) -> tuple[int, int]:
    """Count the trained parameters of ``model`` and all of them, adapters included, vocabulary padding not."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in model.state_dict().items()}
    named = dict(model.named_parameters())  # tied ones once
    trained = sum(sizes[name] for name, parameter in named.items() if parameter.requires_grad)
    return trained, sum(sizes[name] for name in named)
