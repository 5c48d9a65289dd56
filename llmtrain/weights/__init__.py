"""Where the weights come from at step 0."""

from abc import ABC, abstractmethod

from llmtrain.base.options import Option
from llmtrain.model import LanguageModel


class Weights(Option, ABC):
    """Contract of ``weights=...``: called once, on the initialised model, before a run's first step."""

    @abstractmethod
    def load(self, model: LanguageModel) -> None:
        """Fill ``model`` in place.  Raises ValueError naming file and tensor; never skips one in silence."""

    def fingerprint(self) -> str:
        """Changes whenever what is loaded does; "" where nothing is.  For frozen weights, which are not saved."""
        return ""
