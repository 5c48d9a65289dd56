"""Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmtrain.base.checks import non_negative
from llmtrain.optimizer import Trainable
from llmtrain.optimizer.groups import GroupedOptimizer, check_betas, has_fused_kernel, parameter_groups


@dataclass(frozen=True)
class Adam(GroupedOptimizer):
    """Adam; ``weight_decay`` is an L2 penalty, added to the gradient before both moments."""

    takes_shards: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True

    kind: ClassVar[type[torch.optim.Adam]] = torch.optim.Adam

    betas: list[float]
    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas)
        non_negative(eps=self.eps)

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        groups = parameter_groups(self.members(unit), self.lr)
        return build_adam(self.kind, groups, betas=self.betas, eps=self.eps)


def build_adam(
    kind: type[torch.optim.Adam], groups: list[dict[str, Any]], *, betas: list[float], eps: float
) -> torch.optim.Adam:
    """Build torch's Adam or AdamW over ``groups``, fused if there is a kernel, with the state of step 0."""
    beta1, beta2 = betas
    fused = has_fused_kernel(groups)
    optimizer = kind(groups, betas=(beta1, beta2), eps=eps, fused=fused)
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                # the fused kernel counts on its device, the others on the host
                "step": torch.zeros((), device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer
