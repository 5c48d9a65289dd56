"""Choice of the activations that are kept for backward and of those that are recomputed."""

from abc import ABC, abstractmethod

from llmtrain.base.options import Option
from llmtrain.model import LanguageModel


class ActivationCheckpointing(Option, ABC):
    """Contract of ``activation_checkpointing=...``: applied once to the whole model, before anything is compiled."""

    @abstractmethod
    def apply(self, model: LanguageModel) -> None:
        """Change ``model`` in place: which activations a forward pass keeps for the backward pass.

        Losses and gradients equal those of ``none`` to the bit, dropout included; the names of parameters stay;
        evaluation and generation, which run without gradients, do not change.  Raises ValueError if this model or its
        device does not support the option.
        """
