"""Muon for the matrices of the blocks, AdamW for everything else.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, https://arxiv.org/abs/2502.16982.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmtrain.base.checks import non_negative, positive
from llmtrain.base.device import device_type, has_native_bf16, has_no_data
from llmtrain.optimizer import ShardedTrainable, Trainable, divide_gradients, undone_if
from llmtrain.optimizer.adam import build_adam
from llmtrain.optimizer.composite import CompositeOptimizer
from llmtrain.optimizer.groups import GroupedOptimizer, Member, check_betas, parameter_groups


class AdjustLR(Enum):
    """The dependence of Muon's learning rate on the shape (rows, columns) of a matrix."""

    original = "original"  # sqrt(max(1, rows / columns)), Jordan et al.
    match_rms_adamw = "match_rms_adamw"  # 0.2 * sqrt(max(rows, columns)): the update size of AdamW, Liu et al.


@dataclass(frozen=True)
class Muon(GroupedOptimizer):
    """Muon: the update of a matrix is its momentum, orthogonalised by Newton-Schulz iterations.

    ``lr`` is the rate of the two-dimensional parameters of the blocks.  AdamW trains embeddings, head, norms and biases
    at ``adamw_lr``, which follows the same schedule: their groups' ``lr_multiplier`` includes ``adamw_lr / lr``.
    """

    takes_shards: ClassVar[bool] = True

    momentum: float
    nesterov: bool
    ns_steps: int
    adjust_lr_fn: AdjustLR
    adamw_lr: float
    betas: list[float]
    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be at least 0 and below 1")
        if not 1 <= self.ns_steps < 100:
            raise ValueError(f"ns_steps={self.ns_steps}: must be at least 1 and below 100; 5 is usual")
        positive(adamw_lr=self.adamw_lr)
        check_betas(self.betas)
        non_negative(eps=self.eps)

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        members = self.members(unit)
        matrices: list[Member] = []
        rest: list[Member] = []
        for member in members:
            if is_hidden_matrix(member):
                matrices.append(member)
            else:
                rest.append(replace(member, lr_multiplier=member.lr_multiplier * self.adamw_lr / self.lr))
        if not matrices:
            raise ValueError("optimizer=muon: no matrix of a block is trainable; optimizer=adamw trains the rest")
        shards = unit if isinstance(unit, ShardedTrainable) else None
        parts: list[torch.optim.Optimizer] = [self._build_muon(matrices, shards)]
        if rest:
            groups = parameter_groups(rest, self.lr)
            parts.append(build_adam(torch.optim.AdamW, groups, betas=self.betas, eps=self.eps))
        return CompositeOptimizer(parts)

    def _build_muon(self, matrices: list[Member], shards: ShardedTrainable | None) -> torch.optim.Optimizer:
        optimizer = MuonOptimizer(
            parameter_groups(matrices, self.lr),
            shards,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            adjust_lr_fn=self.adjust_lr_fn.value,
        )
        for member in matrices:
            buffer = torch.zeros_like(member.parameter, memory_format=torch.preserve_format)
            optimizer.state[member.parameter] = {"momentum_buffer": buffer}
        return optimizer


class MuonOptimizer(torch.optim.Muon):
    """torch's Muon, which also skips a step on the device and multiplies in the faster of bf16 and fp32.

    By torch's convention: while the attribute ``found_inf`` is a tensor of 1.0, :meth:`step` changes neither weights
    nor state, and gradients are divided by the tensor ``grad_scale``.

    With ``shards`` the matrices are this rank's parts, and so is their momentum.  Each update is gathered, made
    orthogonal as a whole on every rank, and applied to the rank's own part: one exchange a matrix.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict[str, Any]], shards: ShardedTrainable | None = None, **keywords: Any) -> None:
        super().__init__(groups, **keywords)
        self.shards = shards

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        skipped = None if found_inf is None else found_inf != 0
        if skipped is not None and device_type(skipped) == "cpu":  # read at no cost; undoing takes copies
            if skipped:
                return
            skipped = None
        for group in self.param_groups:
            divide_gradients(group["params"], getattr(self, "grad_scale", None))
            for name, matrix in zip(group["names"], group["params"], strict=True):
                if matrix.grad is not None:
                    buffer = self.state[matrix]["momentum_buffer"]
                    with undone_if(skipped, matrix, buffer):  # one at a time: no copies of all matrices at once
                        update_matrix(matrix, matrix.grad, buffer, group, self.shards, name)


def update_matrix(
    matrix: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    group: dict[str, Any],
    shards: ShardedTrainable | None = None,
    name: str = "",
) -> None:
    """Update ``matrix`` ``(rows, columns)`` and its ``momentum`` in place by the keys of its parameter ``group``.

    With ``shards`` all three are this rank's parts of the matrix ``name``.
    """
    momentum.lerp_(gradient, 1 - group["momentum"])
    update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    if shards is not None:
        update = shards.gather(name, update.to(_fast_dtype(update)))  # the dtype of the iterations: half the traffic
    rows, columns = update.shape
    update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
    if shards is not None:
        update = shards.own_part(name, update)
    scale = (
        math.sqrt(max(1, rows / columns))
        if group["adjust_lr_fn"] == "original"
        else 0.2 * math.sqrt(max(rows, columns))
    )
    matrix.mul_(1 - group["lr"] * group["weight_decay"])
    matrix.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Return ``matrix`` ``(rows, columns)`` with its singular values moved near 1: U V^T of U S V^T, about.

    ``steps`` quintic Newton-Schulz iterations, ``coefficients`` (a, b, c), X <- a X + (b A + c A A) X with A = X X^T
    (Jordan et al. 2024), in bf16 where the device multiplies it natively.  Elsewhere in fp32: a CPU that emulates bf16
    takes twenty times as long.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(_fast_dtype(matrix))
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=eps)  # the largest singular value is at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _fast_dtype(matrix: Tensor) -> torch.dtype:
    """The dtype of fast products on the device of ``matrix``; bf16 on a GPU that is planned for."""
    is_planned_gpu = has_no_data(matrix) and device_type(matrix) == "cuda"
    return torch.bfloat16 if is_planned_gpu or has_native_bf16(matrix.device) else torch.float32


def is_hidden_matrix(member: Member) -> bool:
    """Return whether the parameter is a matrix within a block: one that maps hidden units to hidden units."""
    return member.parameter.dim() == 2 and member.is_in_block
