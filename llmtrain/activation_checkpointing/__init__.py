"""What is kept between forward and backward, and what is computed a second time instead."""

from abc import ABC, abstractmethod

from llmtrain.base.options import Option
from llmtrain.model import LanguageModel


class ActivationCheckpointing(Option, ABC):
    """Contract of ``activation_checkpointing=...``: called once the model is whole, before anything is compiled."""

    @abstractmethod
    def apply(self, model: LanguageModel) -> None:
        """Change in place what ``model`` keeps of a forward pass for the backward pass.

        Losses and gradients stay those of ``none`` to the bit, dropout included; names of parameters stay; what runs
        without gradients (evaluation, generation) is as it was.  Raises ValueError for what this model or its device
        cannot have.
        """
