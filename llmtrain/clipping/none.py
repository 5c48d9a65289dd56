"""No clipping."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from llmtrain.clipping import Clipping, ClipResult, Shares
from llmtrain.clipping.base import measure


@dataclass(frozen=True)
class NoClipping(Clipping):
    """No clipping; the gradients are only measured."""

    takes_shards: ClassVar[bool] = True

    start_step = 0

    @torch.no_grad()
    def __call__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        step: int,
        *,
        largest: bool = True,
        over: Shares | None = None,
    ) -> ClipResult:
        gradients = measure(parameters, over)
        return gradients.result(torch.zeros_like(gradients.norm, dtype=torch.bool), None, largest=largest)
