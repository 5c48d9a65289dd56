"""Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235), as implemented in torch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.base.checks import non_negative, positive
from llmtrain.optimizer import Trainable
from llmtrain.optimizer.groups import GroupedOptimizer, parameter_groups


@dataclass(frozen=True)
class Adafactor(GroupedOptimizer):
    """Adafactor: a second moment of one row and one column for each matrix, no first moment, so almost no state.

    The step is relative to the size of the parameter, ``max(eps2, RMS(w)) * min(lr, 1 / sqrt(step))``, and
    ``weight_decay`` is decoupled.  torch copies the norm of every parameter and update to the host.
    """

    beta2_decay: float
    clipping_threshold: float
    eps1: float | None
    eps2: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta2_decay <= 0:
            raise ValueError(f"beta2_decay={self.beta2_decay}: must not be positive; the paper has -0.8")
        if not self.clipping_threshold >= 1:
            raise ValueError(f"clipping_threshold={self.clipping_threshold}: must be at least 1")
        positive(eps1=self.eps1)
        non_negative(eps2=self.eps2)

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        members = self.members(unit)
        optimizer = torch.optim.Adafactor(
            parameter_groups(members, self.lr),
            beta2_decay=self.beta2_decay,
            d=self.clipping_threshold,
            eps=(self.eps1, self.eps2),
        )
        for member in members:
            optimizer.state[member.parameter] = initial_state(member.parameter)
        return optimizer


def initial_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state of step 0: (…, rows, columns) has ``row_var`` (…, rows, 1) and ``col_var`` (…, 1, columns)."""
    state = {"step": torch.tensor(0.0)}  # torch counts on the host
    if parameter.dim() < 2:
        return state | {"variance": torch.zeros_like(parameter, memory_format=torch.preserve_format)}
    *batch, rows, columns = parameter.shape
    return state | {
        "row_var": parameter.detach().new_zeros((*batch, rows, 1)),
        "col_var": parameter.detach().new_zeros((*batch, 1, columns)),
    }
