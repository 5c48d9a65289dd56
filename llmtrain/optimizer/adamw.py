"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""

from dataclasses import dataclass

import torch

from llmtrain.optimizer import Trainable
from llmtrain.optimizer.adam import Adam, build_adam
from llmtrain.optimizer.groups import parameter_groups


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: ``w -= lr * weight_decay * w``, apart from the gradient."""

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        groups = parameter_groups(self.members(unit), self.lr)
        return build_adam(torch.optim.AdamW, groups, betas=self.betas, eps=self.eps)
