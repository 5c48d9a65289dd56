"""What is minimised."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmtrain.base.options import Option
from llmtrain.model import LanguageModel


class Objective(Option, ABC):
    """Contract of ``objective=...``."""

    scores: ClassVar[bool] = False  # whether :meth:`score` counts more than the loss
    generates: ClassVar[bool] = True  # whether the model is to write text, so that samples of it say something
    verb: ClassVar[str] = "generate"  # what the trained model is asked with
    takes: ClassVar[tuple[str, ...]] = ("text", "responses")  # the kinds of data (``DataConfig.gives``) it goes with

    @abstractmethod
    def __call__(self, model: LanguageModel, inputs: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """The **sum** of the losses over the valid targets, fp32, 0-dimensional.

        ``inputs`` and ``targets``: ``(batch, sequence)``; a target of -100 carries no loss.  The loop divides by
        the number of valid targets of the whole optimizer step.  ``segments`` ``(batch, sequence)``: which example of
        a packed row a token belongs to, 0 for padding; None: a row is one example, padded on the right.
        """

    def attach(
        self,
        model: LanguageModel,
        labels: Sequence[str],
        generator: torch.Generator,
        class_weights: Sequence[float] = (),
    ) -> None:
        """Add to ``model`` what the objective needs of it, and freeze what it does not train; nothing by default.

        Called once weights are loaded, and before adapters are added.  ``labels`` are the data's classes,
        ``class_weights`` what an example of each counts; (): all the same.
        """

    def score(self, model: LanguageModel, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For an evaluation: the loss as by calling, and what else was counted, a tensor to be summed over batches."""
        raise AssertionError("this objective counts nothing but the loss")

    def measures(self, counted: Tensor, labels: Sequence[str]) -> dict[str, Any]:
        """What a metrics row tells of what :meth:`score` counted."""
        return {}

    def name_target(self, target: int, labels: Sequence[str]) -> str:
        """The class, or classes, that a target stands for; where targets are classes."""
        return labels[target]
