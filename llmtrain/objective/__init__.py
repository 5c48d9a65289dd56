"""What is minimised."""

from abc import ABC, abstractmethod

from torch import Tensor

from llmtrain.model import LanguageModel


class Objective(ABC):
    """Contract of ``objective=...``."""

    @abstractmethod
    def __call__(self, model: LanguageModel, inputs: Tensor, targets: Tensor) -> Tensor:
        """The **sum** of the token losses over the valid targets, fp32, 0-dimensional.

        ``inputs`` and ``targets``: ``(batch, sequence)``; a target of -100 carries no loss.  The loop divides by
        the number of valid targets of the whole optimizer step.
        """
