"""Stochastic gradient descent with momentum (Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmtrain.optimizer import Trainable
from llmtrain.optimizer.groups import GroupedOptimizer, has_fused_kernel, parameter_groups


@dataclass(frozen=True)
class SGD(GroupedOptimizer):
    """SGD; ``weight_decay`` is an L2 penalty, added to the gradient."""

    takes_shards: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True

    momentum: float
    nesterov: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be at least 0 and below 1")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True: needs a momentum above 0")

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        groups = parameter_groups(self.members(unit), self.lr)
        optimizer = torch.optim.SGD(
            groups, momentum=self.momentum, nesterov=self.nesterov, fused=has_fused_kernel(groups)
        )
        if self.momentum:
            # torch's fused kernel starts with uninitialised buffers and leaves them so if the first step is
            # refused.  With zeros the first step is the same: 0 * momentum + gradient.
            for group in groups:
                for parameter in group["params"]:
                    buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    optimizer.state[parameter] = {"momentum_buffer": buffer}
        return optimizer
