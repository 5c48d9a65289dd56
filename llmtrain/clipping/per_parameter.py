"""Clipping of each tensor by its own norm."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmtrain.base.checks import pattern, pattern_matches, positive
from llmtrain.clipping.base import Gradients, MeasuredClipping


@dataclass(frozen=True)
class PerParameterClipping(MeasuredClipping):
    """Each gradient scaled by ``threshold / norm`` if its own L2 norm exceeds its threshold.

    The first pattern in ``thresholds`` that matches a parameter's name (``re.search``) gives its threshold; without a
    match it is ``max_norm``.
    """

    takes_shards: ClassVar[bool] = True

    max_norm: float
    thresholds: dict[str, float]

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(max_norm=self.max_norm)
        for key, threshold in self.thresholds.items():
            pattern("thresholds", key)
            positive(**{f"thresholds[{key!r}]": threshold})

    def check_parameters(self, names: Sequence[str]) -> None:
        for key in self.thresholds:
            pattern_matches("thresholds", key, names)

    def clip(self, gradients: Gradients) -> tuple[Tensor, None]:
        excesses = list(torch._foreach_div(gradients.norms, [self.threshold(name) for name in gradients.names]))
        torch._foreach_clamp_min_(excesses, 1.0)  # division by exactly 1 changes no bit
        torch._foreach_div_(gradients.tensors, excesses)
        return (torch.stack(excesses) > 1).any(), None

    def threshold(self, name: str) -> float:
        """The largest norm allowed for the gradient of the parameter ``name``."""
        return next((limit for key, limit in self.thresholds.items() if re.search(key, name)), self.max_norm)
