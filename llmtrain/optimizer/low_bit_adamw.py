"""AdamW with moments in fewer than 32 bits: the common part of its options."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.checks import non_negative
from llmtrain.base.device import device_type
from llmtrain.optimizer import Trainable
from llmtrain.optimizer.adam import build_adam
from llmtrain.optimizer.adamw import AdamW
from llmtrain.optimizer.blockwise_quantization import BLOCK
from llmtrain.optimizer.composite import CompositeOptimizer
from llmtrain.optimizer.groups import Member, parameter_groups
from llmtrain.optimizer.stochastic_rounding import noise, seed_of, step_seeds

# Elements processed at once; the temporary fp32 tensors hold some 10 times as many numbers.
CHUNK_ON_CPU, CHUNK = 1 << 18, 1 << 22


class Moments(ABC):
    """Storage format of the two moments of a parameter."""

    @abstractmethod
    def zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        """Make the state of step 0: flat or of the parameter's shape, an entry for each element or for each block."""

    @abstractmethod
    def read(self, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode both moments (blocks, numbers) to fp32, from a stretch of the entries of :meth:`zeros`, in order."""

    @abstractmethod
    def write(self, exp_avg: Tensor, exp_avg_sq: Tensor, noise: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        """Encode both moments, the inverse of :meth:`read`; ``noise`` rounds them (see ``stochastic_rounding``)."""


@dataclass(frozen=True)
class CompactAdamW(AdamW):
    """AdamW with the moments of larger parameters in few bits, and those of the others in fp32."""

    min_elements: int

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(min_elements=self.min_elements)

    @abstractmethod
    def moments(self, parameters: Sequence[Tensor]) -> Moments:
        """Choose the storage format of the moments of ``parameters``."""

    def is_compact(self, member: Member) -> bool:
        """Decide if the moments of this parameter are kept in few bits."""
        return member.parameter.numel() >= self.min_elements and member.parameter.is_contiguous()

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        members = self.members(unit)
        compact = [member for member in members if self.is_compact(member)]
        whole = [member for member in members if not self.is_compact(member)]
        parts: list[torch.optim.Optimizer] = []
        if compact:
            moments = self.moments([member.parameter for member in compact])
            parts.append(CompactAdamWOptimizer(parameter_groups(compact, self.lr), self.betas, self.eps, moments))
        if whole:
            parts.append(
                build_adam(torch.optim.AdamW, parameter_groups(whole, self.lr), betas=self.betas, eps=self.eps)
            )
        return CompositeOptimizer(parts)


class CompactAdamWOptimizer(torch.optim.Optimizer):
    """Equal to torch's AdamW, except that the moments are rounded after each step.

    One stretch of a parameter at a time is decoded to fp32 and encoded again.  As with the fused AdamW a step may be
    skipped on the device: while the attribute ``found_inf`` is a tensor of 1.0, :meth:`step` changes nothing.

    ``update``, for stretches of whole blocks, may be replaced by its compiled form, which fuses some 60 kernels into a
    few.  The remainder of a parameter is not compiled: torch 2.13's compiler for CPUs, for one, computes indices out of
    bounds if a row does not fill its vectors.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict[str, Any]], betas: list[float], eps: float, moments: Moments) -> None:
        super().__init__(groups, {"betas": tuple(betas), "eps": eps})
        self.moments = moments
        self.update: Callable[..., None] = self._update
        for group in self.param_groups:
            for parameter in group["params"]:
                step = torch.zeros((), device=parameter.device)
                self.state[parameter] = {"step": step, **moments.zeros(parameter.detach())}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            pairs = zip(group["names"], group["params"], strict=True)
            named = [(name, parameter) for name, parameter in pairs if parameter.grad is not None]
            if named:
                self._step(named, group, found_inf)

    def _step(self, named: list[tuple[str, Tensor]], group: dict[str, Any], found_inf: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        steps = [self.state[parameter]["step"] for _, parameter in named]
        skipped = None
        if found_inf is None:
            torch._foreach_add_(steps, 1)
        else:
            skipped = found_inf != 0
            torch._foreach_add_(steps, [1 - skipped.to(steps[0].dtype)] * len(steps))
        # Numbers that change from step to step are tensors: otherwise the update would be recompiled at each step.
        count = torch.stack(steps)
        rates = group["lr"] / bias_correction(beta1, count)
        roots = bias_correction(beta2, count).sqrt()
        decay = torch.full((), 1 - group["lr"] * group["weight_decay"], device=count.device)
        seeds = step_seeds(count)
        for i, (name, parameter) in enumerate(named):
            assert parameter.grad is not None
            kept = [value for key, value in self.state[parameter].items() if key != "step"]
            for begin, weights, gradient, *stretch in stretches(parameter, parameter.grad, *kept):
                seed = seed_of(seeds[i], name, begin)
                update = self.update if weights.shape[1] == BLOCK else self._update
                scalars = (rates[i], roots[i], decay, seed, skipped, beta1, beta2, group["eps"])
                update(weights, gradient, stretch, *scalars)

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        kept: list[Tensor],
        rate: Tensor,
        root: Tensor,
        decay: Tensor,
        seed: Tensor,
        skipped: Tensor | None,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None:
        """Update one stretch: ``parameter`` and ``gradient`` (blocks, numbers), and its entries of the state."""
        gradient = gradient.float()
        exp_avg, exp_avg_sq = self.moments.read(kept)
        exp_avg = exp_avg.lerp(gradient, 1 - beta1)
        exp_avg_sq = (exp_avg_sq * beta2).addcmul(gradient, gradient, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div(root).add(eps)
        wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        new = wide * decay - exp_avg / denominator * rate
        first, second = (numbers.view_as(gradient) for numbers in noise(seed, gradient.numel()))
        for old, value in zip(
            (parameter, *kept), (new, *self.moments.write(exp_avg, exp_avg_sq, (first, second))), strict=True
        ):
            old.copy_(value if skipped is None else torch.where(skipped, old, value.to(old.dtype)))


def bias_correction(beta: float, count: Tensor) -> Tensor:
    """Compute ``1 - beta ** count`` without the cancellation of the plain formula in fp32."""
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))


def stretches(parameter: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield the first element's number and the views of each stretch of ``parameter`` and ``others``.

    Views are (blocks, BLOCK); the last block of a parameter, if it is shorter, is a separate stretch.  Views of tensors
    with one number for each block are (blocks,).
    """
    size = parameter.numel()
    chunk = CHUNK_ON_CPU if device_type(parameter) == "cpu" else CHUNK
    edges = [*range(0, size - size % BLOCK, chunk), size - size % BLOCK, size]
    for begin, end in pairwise(edges):
        if begin == end:
            continue
        width = min(BLOCK, end - begin)
        views = [
            tensor.reshape(-1)[begin:end].view(-1, width)
            if tensor.numel() == size
            else tensor[begin // BLOCK : -(-end // BLOCK)]
            for tensor in (parameter, *others)
        ]
        yield begin, *views
