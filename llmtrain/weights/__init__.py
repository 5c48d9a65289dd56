"""Sources of the initial weights: the contract of ``weights=...``."""

from abc import ABC, abstractmethod
from typing import ClassVar

from llmtrain.base.options import Option
from llmtrain.checkpoint.own_parts import OwnParts
from llmtrain.model import LanguageModel


class Weights(Option, ABC):
    """Contract of ``weights=...``, called once, on the initialised model, before the first step of a run."""

    takes_parts: ClassVar[bool] = False  # True: :meth:`load_parts` loads what :meth:`load` does

    @abstractmethod
    def load(self, model: LanguageModel) -> None:
        """Fill ``model`` in place.  Raises ValueError naming file and tensor; no tensor is skipped in silence."""

    def load_parts(self, model: LanguageModel, parts: OwnParts) -> None:
        """Fill this rank's ``parts`` of the parameters of ``model``, which has no whole ones; raises as :meth:`load`.

        At no time are there more than the whole tensors of one layer in memory.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the weights, for frozen weights, which are not saved; "" where none are loaded."""
        return ""
