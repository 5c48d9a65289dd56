"""Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235), as implemented in torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.base.checks import non_negative, positive
from llmtrain.base.device import device_type
from llmtrain.optimizer import Trainable, divide_gradients, undone_if
from llmtrain.optimizer.groups import GroupedOptimizer, parameter_groups


@dataclass(frozen=True)
class Adafactor(GroupedOptimizer):
    """Adafactor: a second moment of one row and one column for each matrix, no first moment, so almost no state.

    The step is relative to the size of the parameter, ``max(eps2, RMS(w)) * min(lr, 1 / sqrt(step))``, and
    ``weight_decay`` is decoupled.
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
        # torch's reads norms on the host, which costs nothing on a CPU
        on_host = all(device_type(member.parameter) == "cpu" for member in members)
        optimizer = (torch.optim.Adafactor if on_host else DeviceAdafactor)(
            parameter_groups(members, self.lr),
            beta2_decay=self.beta2_decay,
            d=self.clipping_threshold,
            eps=(self.eps1, self.eps2),
        )
        for member in members:
            optimizer.state[member.parameter] = initial_state(member.parameter)
        return optimizer


class DeviceAdafactor(torch.optim.Adafactor):
    """torch's Adafactor without its copies of norms to the host: equal up to rounding.

    By torch's convention a step is also skipped on the device: while the attribute ``found_inf`` is a tensor of 1.0,
    :meth:`step` changes neither weights nor state.  Gradients are divided by the tensor ``grad_scale``.
    """

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                divide_gradients(parameters, getattr(self, "grad_scale", None))
                self._step(parameters, group, None if found_inf is None else found_inf != 0)

    def _step(self, parameters: list[Tensor], group: dict[str, Any], skipped: Tensor | None) -> None:
        steps = [self.state[parameter]["step"] for parameter in parameters]
        counted = 1.0 if skipped is None else [1 - skipped.to(steps[0].dtype)] * len(steps)
        torch._foreach_add_(steps, counted)
        # in float64, as torch computes on the host; step 0 is one that is skipped
        count = torch.stack(steps).double().clamp(min=1)
        norms = torch.stack(torch._foreach_norm(parameters)).double().unbind()
        sizes = torch.stack(torch._foreach_div(norms, [parameter.numel() ** 0.5 for parameter in parameters]))
        rates = sizes.clamp(min=group["eps"][1]) * count.rsqrt().clamp(max=group["lr"])
        shares = count ** group["beta2_decay"]
        for parameter, rate, share in zip(parameters, rates, shares, strict=True):
            self._update(parameter, rate, share.to(parameter.dtype), group, skipped)

    def _update(
        self, parameter: Tensor, rate: Tensor, share: Tensor, group: dict[str, Any], skipped: Tensor | None
    ) -> None:
        """Update one parameter with the 0-dimensional ``rate``; ``share`` is that of the new gradient in the state."""
        state, gradient, eps1 = self.state[parameter], parameter.grad, group["eps"][0]
        assert gradient is not None
        if eps1 is None:
            eps1 = torch.finfo(parameter.dtype).eps

        def average(key: str, new: Tensor) -> Tensor:
            # an average stays the same if the new value equals it
            return state[key].lerp_(new if skipped is None else torch.where(skipped, state[key], new), share)

        if gradient.dim() > 1:
            rows, columns = gradient.shape[-2:]
            row_var = average("row_var", torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).square_() / columns)
            col_var = average("col_var", torch.linalg.vector_norm(gradient, dim=-2, keepdim=True).square_() / rows)
            update = row_var / row_var.mean(dim=-2, keepdim=True).clamp_(min=eps1) * col_var
        else:
            update = average("variance", gradient.square()).clone()
        update.clamp_(min=eps1 * eps1).rsqrt_().mul_(gradient)
        excess = torch.linalg.vector_norm(update).double() / (update.numel() ** 0.5 * group["d"])
        with undone_if(skipped, parameter):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcmul_(update, (rate / excess.clamp(min=1)).to(parameter.dtype), value=-1)


def initial_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state of step 0: (…, rows, columns) has ``row_var`` (…, rows, 1) and ``col_var`` (…, 1, columns)."""
    state = {"step": torch.zeros((), device=parameter.device)}
    if parameter.dim() < 2:
        return state | {"variance": torch.zeros_like(parameter, memory_format=torch.preserve_format)}
    *batch, rows, columns = parameter.shape
    return state | {
        "row_var": parameter.detach().new_zeros((*batch, rows, 1)),
        "col_var": parameter.detach().new_zeros((*batch, 1, columns)),
    }
