"""Next-token prediction of responses alone."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.objective.causal import Causal


@dataclass(frozen=True)
class Instruction(Causal):
    """The objective :class:`Causal` on data that mark the tokens of responses as targets.

    A separate option, so that data that do not mark responses are refused.
    """

    takes: ClassVar[tuple[str, ...]] = ("responses",)
    verb: ClassVar[str] = "chat"
