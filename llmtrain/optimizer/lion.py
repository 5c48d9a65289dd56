"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmtrain.optimizer import Trainable, divide_gradients
from llmtrain.optimizer.groups import GroupedOptimizer, check_betas, parameter_groups


@dataclass(frozen=True)
class Lion(GroupedOptimizer):
    """Lion: every step has the size ``lr`` in each coordinate; ``weight_decay`` is decoupled.

    The authors use a rate 3 to 10 times smaller than AdamW's and a decay larger by the same factor (section 5).
    """

    takes_shards: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True

    betas: list[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas)

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        return LionOptimizer(parameter_groups(self.members(unit), self.lr), self.betas)


class LionOptimizer(torch.optim.Optimizer):
    """``c = beta1 * m + (1 - beta1) * g``; ``w -= lr * (sign(c) + weight_decay * w)``; ``m += (1 - beta2) * (g - m)``.

    A step can be refused on the device, by torch's convention: while the attribute ``found_inf`` is a tensor of 1.0,
    :meth:`step` changes only the gradients, which are not used again.  They are divided by the tensor ``grad_scale``.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict[str, Any]], betas: list[float]) -> None:
        super().__init__(groups, {"betas": tuple(betas)})
        for group in self.param_groups:
            for parameter in group["params"]:
                average = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                self.state[parameter] = {"exp_avg": average}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                divide_gradients(parameters, getattr(self, "grad_scale", None))
                self._update(parameters, group, found_inf)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages: list[Tensor] = [self.state[parameter]["exp_avg"] for parameter in parameters]
        decay: Any = 1 - group["lr"] * group["weight_decay"]
        rate: Any = -group["lr"]
        if found_inf is not None:
            # A refused step must change nothing: an average stays the same if the gradient equals it.
            refused = found_inf != 0
            for gradient, average in zip(gradients, averages, strict=True):
                torch.where(refused, average, gradient, out=gradient)
            one = torch.ones((), dtype=torch.promote_types(parameters[0].dtype, torch.float32), device=refused.device)
            decay = torch.where(refused, one, decay)
            rate = torch.where(refused, 0 * one, rate)
        updates: list[Tensor] = list(torch._foreach_lerp(averages, gradients, 1 - beta1))
        torch._foreach_sign_(updates)
        torch._foreach_mul_(updates, rate)
        torch._foreach_mul_(parameters, decay)
        torch._foreach_add_(parameters, updates)
        torch._foreach_lerp_(averages, gradients, 1 - beta2)
