"""AdamW with moments in fewer than 32 bits: the common part of its options."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.checks import non_negative
from llmtrain.base.device import device_type
from llmtrain.base.trusted_files import prepare_compiler_cache
from llmtrain.optimizer import Trainable
from llmtrain.optimizer.adam import build_adam
from llmtrain.optimizer.adamw import AdamW
from llmtrain.optimizer.blockwise_quantization import BLOCK
from llmtrain.optimizer.composite import CompositeOptimizer
from llmtrain.optimizer.groups import Member, parameter_groups
from llmtrain.optimizer.stochastic_rounding import name_seed, noise, step_seeds

# Elements processed at once; the temporary fp32 tensors hold some 10 times as many numbers.  Compiled, there are no
# temporary tensors, and indices are of 32 bits.
CHUNK_ON_CPU, CHUNK, COMPILED_CHUNK = 1 << 18, 1 << 24, 1 << 30

log = logging.getLogger(__name__)


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
        return math.prod(member.shape) >= self.min_elements and member.parameter.is_contiguous()

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        members = self.members(unit)
        compact = [member for member in members if self.is_compact(member)]
        whole = [member for member in members if not self.is_compact(member)]
        parts: list[torch.optim.Optimizer] = []
        if compact:
            moments = self.moments([member.parameter for member in compact])
            groups, first = parameter_groups(compact, self.lr), {m.name: m.first_element for m in compact}
            parts.append(CompactAdamWOptimizer(groups, self.betas, self.eps, moments, first))
        if whole:
            parts.append(
                build_adam(torch.optim.AdamW, parameter_groups(whole, self.lr), betas=self.betas, eps=self.eps)
            )
        return CompositeOptimizer(parts)


class CompactAdamWOptimizer(torch.optim.Optimizer):
    """Equal to torch's AdamW, except that the moments are rounded after each step.

    One stretch of a parameter at a time is decoded to fp32 and encoded again.  As with the fused AdamW a step may be
    skipped on the device: while the attribute ``found_inf`` is a tensor of 1.0, :meth:`step` changes nothing.
    Gradients are divided by the tensor ``grad_scale``.

    ``update`` is for stretches of whole blocks.  On a GPU it is compiled at the first step: one kernel for a whole
    parameter, where the eager form has some 45 (bf16) or 90 (8 bits) for each stretch, all limited by memory traffic.
    The remainder of a parameter is not compiled: torch 2.13's compiler for CPUs, for one, computes indices out of
    bounds if a row does not fill its vectors.  On a CPU the eager form is as fast.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: list[float],
        eps: float,
        moments: Moments,
        first_elements: Mapping[str, int],
    ) -> None:
        super().__init__(groups, {"betas": tuple(betas), "eps": eps})
        self.moments = moments
        self.first_elements = first_elements  # by name; a part of a parameter is rounded as in the whole
        self.update: Callable[..., None] = self._update
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device = parameters[0].device
        self.chunk = CHUNK_ON_CPU if device_type(parameters[0]) == "cpu" else CHUNK
        # a plan's tensors have no data, and no kernel runs on them
        self.is_to_compile = device.type == "cuda" and torch._guards.detect_fake_mode() is None
        names = [name for group in self.param_groups for name in group["names"]]
        seeds = torch.tensor([name_seed(name) for name in names], dtype=torch.int32).to(device)
        self.name_seeds = dict(zip(names, seeds.unbind(), strict=True))
        for parameter in parameters:
            step = torch.zeros((), device=parameter.device)
            kept = moments.zeros(parameter.detach())
            self.state[parameter] = {"step": step, **kept}
            self.kept_keys = tuple(kept)

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
        # Those of a parameter are the bits of a row of 16 bytes: a compiled kernel would copy a number that is not
        # aligned to as many.
        count = torch.stack(steps)
        rates = group["lr"] / bias_correction(beta1, count)
        roots = bias_correction(beta2, count).sqrt()
        decays = torch.full_like(count, 1 - group["lr"] * group["weight_decay"])
        seeds = step_seeds(count) + torch.stack([self.name_seeds[name] for name, _ in named])
        numbers = torch.stack([*(values.view(torch.int32) for values in (rates, roots, decays)), seeds], dim=1)
        divisor: Tensor | None = getattr(self, "grad_scale", None)
        constants = (beta1, beta2, group["eps"])
        if self.is_to_compile:
            _, largest = max(named, key=lambda pair: pair[1].numel())
            self._compile(largest, numbers[0], constants)
        if self.update is not self._update and divisor is None:
            divisor = torch.ones((), device=count.device)  # it changes no bit, and another form need not be compiled
        for row, (name, parameter) in zip(numbers, named, strict=True):
            for begin, weights, gradient, *stretch in self._stretches(parameter):
                update = self.update if weights.shape[1] == BLOCK else self._update
                update(weights, gradient, stretch, row, skipped, divisor, self.first_elements[name] + begin, *constants)

    def _stretches(self, parameter: Tensor) -> Iterator[tuple[Any, ...]]:
        kept = [self.state[parameter][key] for key in self.kept_keys]
        assert parameter.grad is not None
        return stretches(self.chunk, parameter.detach(), parameter.grad, *kept)

    def _compile(self, parameter: Tensor, row: Tensor, constants: tuple[float, ...]) -> None:
        """Compile the update, for any number of blocks, by one of ``parameter`` that is skipped; report a failure."""
        self.is_to_compile = False
        if not parameter.numel():  # this rank's parts are empty
            return
        chunk, self.chunk = self.chunk, COMPILED_CHUNK
        _, *views = next(self._stretches(parameter))
        for view in views:
            torch._dynamo.maybe_mark_dynamic(view, 0)
        weights, gradient, *stretch = views
        skipped, divisor = (torch.ones((), dtype=dtype, device=row.device) for dtype in (torch.bool, torch.float32))
        prepare_compiler_cache()
        try:
            self.update = torch.compile(self._update, fullgraph=True)
            self.update(weights, gradient, stretch, row, skipped, divisor, 0, *constants)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compilers below have errors of many classes, with no common one
            self.update, self.chunk = self._update, chunk
            first = (str(error).strip().splitlines() or [""])[0]
            log.warning(
                "the optimizer's update is not compiled (%s: %s); its steps are slower without",
                type(error).__name__,
                first,
            )

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        kept: list[Tensor],
        row: Tensor,
        skipped: Tensor | None,
        divisor: Tensor | None,
        begin: int,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None:
        """Update one stretch: ``parameter`` and ``gradient`` (blocks, numbers), and its entries of the state."""
        values = self.new_values(parameter, gradient, kept, row, divisor, begin, beta1, beta2, eps)
        for old, new in zip((parameter, *kept), values, strict=True):
            if skipped is None:
                old.copy_(new)
            else:
                torch.where(skipped, old, new.to(old.dtype), out=old)

    def new_values(
        self,
        parameter: Tensor,
        gradient: Tensor,
        kept: list[Tensor],
        row: Tensor,
        divisor: Tensor | None,
        begin: int,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> tuple[Tensor, ...]:
        """Compute the parameter and the entries of the state after the step.

        ``row`` has the bits of the step's rate, root of the second bias correction, decay and seed; ``begin`` is the
        number of the stretch's first element.
        """
        *floats, seed = row.unbind()
        rate, root, decay = (number.view(torch.float32) for number in floats)
        gradient = gradient.float()
        if divisor is not None:
            gradient = gradient / divisor
        exp_avg, exp_avg_sq = self.moments.read(kept)
        exp_avg = exp_avg.lerp(gradient, 1 - beta1)
        exp_avg_sq = (exp_avg_sq * beta2).addcmul(gradient, gradient, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div(root).add(eps)
        wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        new = wide * decay - exp_avg / denominator * rate
        first, second = (numbers.view_as(gradient) for numbers in noise(seed, gradient.numel(), begin))
        return new, *self.moments.write(exp_avg, exp_avg_sq, (first, second))


def bias_correction(beta: float, count: Tensor) -> Tensor:
    """Compute ``1 - beta ** count`` without the cancellation of the plain formula in fp32."""
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))


def stretches(chunk: int, parameter: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield the first element's number and the views of each stretch of ``parameter`` and ``others``.

    A stretch has at most ``chunk`` elements.
    Views are (blocks, BLOCK); the last block of a parameter, if it is shorter, is a separate stretch.  Views of tensors
    with one number for each block are (blocks,).
    """
    size = parameter.numel()
    edges = [*range(0, size - size % BLOCK, chunk), size - size % BLOCK, size]
    for begin, end in pairwise(edges):
        if begin == end:
            continue
        width = min(BLOCK, end - begin)
        views = [
            tensor.reshape(-1).narrow(0, begin, end - begin).view(-1, width)
            if tensor.numel() == size
            else tensor.narrow(0, begin // BLOCK, -(-(end - begin) // BLOCK))
            for tensor in (parameter, *others)
        ]
        yield begin, *views
