"""DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.lora.low_rank import LowRankAdaptation


@dataclass(frozen=True)
class DoRA(LowRankAdaptation):
    """``m V x / |V|`` with ``V = W + (alpha / rank) B A``: separate magnitude ``m`` and direction of each output.

    The norm ``|V|`` is a constant in the gradient, as in section 4.3 of the paper.
    """

    has_magnitude: ClassVar[bool] = True

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank
