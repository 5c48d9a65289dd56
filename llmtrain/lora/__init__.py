"""Low-rank adapters: a few new weights are trained, and the model's own weights are frozen."""

from abc import ABC, abstractmethod
from typing import ClassVar

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.options import Option
from llmtrain.model import LanguageModel


class Lora(Option, ABC):
    """Contract of ``lora=...``: called once the weights are loaded, before the optimizer is built."""

    adapts: ClassVar[bool] = False  # True if the model's own weights are frozen and come from another checkpoint

    @abstractmethod
    def apply(self, model: LanguageModel, generators: NamedGenerators | None) -> None:
        """Add adapters to ``model`` in place and freeze the parameters that are not trained.

        ``generators`` draw their initial values, the same ones each time that a run starts or resumes; None: they have
        no values yet.  Raises ValueError for a key that does not fit the model.
        """
