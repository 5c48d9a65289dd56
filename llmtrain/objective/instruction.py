"""Next-token prediction of responses alone."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.objective.causal import Causal


@dataclass(frozen=True)
class Instruction(Causal):
    """As :class:`Causal`: which tokens are to be predicted, the data say.

    An option of its own, so that data without a distinction between responses and the rest are refused.
    """

    takes: ClassVar[tuple[str, ...]] = ("responses",)
    verb: ClassVar[str] = "chat"
