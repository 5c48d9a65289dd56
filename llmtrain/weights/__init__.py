"""Sources of the initial weights: the contract of ``weights=...``."""

from abc import ABC, abstractmethod

from llmtrain.base.options import Option
from llmtrain.model import LanguageModel


class Weights(Option, ABC):
    """Contract of ``weights=...``, called once, on the initialised model, before the first step of a run."""

    @abstractmethod
    def load(self, model: LanguageModel) -> None:
        """Fill ``model`` in place.  Raises ValueError naming file and tensor; no tensor is skipped in silence."""

    def fingerprint(self) -> str:
        """A hash of the weights, for frozen weights, which are not saved; "" where none are loaded."""
        return ""
