"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmtrain.optimizer.adam import Adam


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: ``w -= lr * weight_decay * w``, apart from the gradient."""

    kind: ClassVar[type[torch.optim.Adam]] = torch.optim.AdamW
