"""One optimizer step: gradients of a batch, micro-batch by micro-batch, and the update."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.clipping import Clipping, ClipResult
from llmtrain.data import Batch
from llmtrain.distributed.parallel import Parallel
from llmtrain.objective import TrainingUnit, mean_losses
from llmtrain.precision import Precision
from llmtrain.train.out_of_memory import RankOutOfMemory, halve_on_out_of_memory, is_out_of_memory


class Timer(Protocol):
    """An observer of the phases of a step."""

    def mark(self, phase: str) -> None:
        """Assign the work since the last mark to ``phase``."""


class NoTimer:
    """A timer that records nothing."""

    def mark(self, phase: str) -> None:
        pass


@dataclass
class StepLoss:
    """The loss of a step, on the device."""

    total: Tensor  # weighted sum of the parts, 0-dimensional
    parts: dict[str, Tensor]  # each loss by name, a mean over its valid targets
    flags: Tensor | None = None  # the sums over all ranks of those given to :meth:`Step.gradients`


class Step:
    """The gradients and the update of one optimizer step; the same for training, its rehearsal and its plan.

    The host only launches work here: it never waits for the device.

    ``keeps_gradients`` is for CUDA graphs.  What a graph returns lies in memory that its next run overwrites
    (torch/_inductor/cudagraph_trees.py), so ``p.grad`` must exist before a graph runs: then autograd adds to it in
    place.  The tensors are made here and zeroed after each step.  Otherwise gradients are freed, which saves memory.
    """

    def __init__(
        self,
        unit: TrainingUnit,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        micro_batch_size: int,
        *,
        timer: Timer | None = None,
        on_halved: Callable[[int, str], None] = lambda size, message: None,
        keeps_gradients: bool = False,
        parallel: Parallel | None = None,
    ) -> None:
        self.unit = unit
        self.optimizer = optimizer
        self.precision = precision
        self.micro_batch_size = micro_batch_size  # sequences of a forward pass at most; halved when memory runs out
        self.timer: Timer = timer or NoTimer()
        self.on_halved = on_halved  # called with the new size and the error's message
        self.parallel = parallel or Parallel(unit)  # the way in which ranks share the unit
        self.weights = self.parallel.weights()  # of a sharded unit this rank's part of each
        self.keeps_gradients = keeps_gradients
        if keeps_gradients:
            for _, weight in self.weights:
                weight.grad = torch.zeros_like(weight)

    def gradients(self, batch: Batch, flags: Tensor | None = None) -> StepLoss:
        """Run forward and backward of every micro-batch, in smaller ones when memory runs out; unscale the gradients.

        Each micro-batch adds (its sums of losses) / (valid targets of the whole step), so any split of the batch gives
        the gradient of the whole.  With several ranks ``batch`` is the part of this one.  The losses are summed over
        them, and ``flags`` ``(flags,)``, numbers that the ranks have to agree on, in the same exchange.

        Raises RankOutOfMemory where memory runs out on one of several ranks.
        """
        size = min(self.micro_batch_size, self._largest_part(batch))
        if self.parallel.world.size == 1:
            loss = halve_on_out_of_memory(lambda size: self.accumulate(batch, size), size, self._halve)
            loss.flags = flags
        else:
            loss = self._sum(self._accumulate_or_fail(batch, size), flags)
        self.precision.unscale([parameter for _, parameter in self.weights])
        return loss

    def accumulate(self, batch: Batch, micro_batch_size: int) -> StepLoss:
        """Run forward and backward of ``batch`` in parts of ``micro_batch_size`` sequences; the losses are this rank's.

        Every rank runs as many parts as the one with the most sequences.
        """
        passes = math.ceil(self._largest_part(batch) / micro_batch_size)
        parts = islice(chain(batch.split(micro_batch_size), (batch.filler() for _ in count())), passes)
        with self.precision.constant_weights(passes) if self.parallel.keeps_casts else nullcontext():
            return self._accumulate(parts, passes)

    def _accumulate(self, micro_batches: Iterator[Batch], passes: int) -> StepLoss:
        if (of_all := self.parallel.run_all(micro_batches, self.precision)) is not None:
            self.timer.mark("backward")  # forward and backward passes by turns
            return StepLoss(*of_all)
        total: Tensor | None = None
        parts: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches, 1):
            is_last = number == passes
            with self.parallel.prepare(is_last=is_last):
                # a region for each pass: weights that are gathered for one are not those of the next
                with self.precision.autocast():
                    loss, losses = mean_losses(self.unit, self.unit.fit_shape(micro_batch), self.parallel.forward)
                self.timer.mark("forward")
                self.parallel.backward(self.precision.scale(loss), is_last=is_last)
                self.timer.mark("backward")
            loss = loss.detach()
            total = loss if total is None else total + loss
            for name, part in losses.items():
                parts[name] = part.detach() if name not in parts else parts[name] + part.detach()
        assert total is not None
        return StepLoss(total, parts)

    def _largest_part(self, batch: Batch) -> int:
        return batch.largest_part(self.parallel.data_size)

    def _accumulate_or_fail(self, batch: Batch, size: int) -> StepLoss:
        """Accumulate; an error that memory ran out names this rank."""
        try:
            return self.accumulate(batch, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            world, reason = self.parallel.world, str(error).splitlines()[0]
        smaller = (size + 1) // 2 if size > 1 else 0
        remedy = (
            f"take accumulation.micro_batch_size={smaller}"
            if smaller
            else "shard over more ranks, or take shorter sequences or a smaller model"
        )
        raise RankOutOfMemory(
            f"accumulation.micro_batch_size={size}: memory ran out on rank {world.rank}"
            f"{f' ({world.host})' if world.host else ''}: {reason}; {remedy}",
            smaller,
        )

    def _sum(self, own: StepLoss, flags: Tensor | None) -> StepLoss:
        """The loss of all ranks' parts, by one exchange."""
        losses, flags = self.parallel.sum_losses(torch.stack([own.total, *own.parts.values()]), flags)
        total, *parts = losses.unbind()
        return StepLoss(total, dict(zip(own.parts, parts, strict=True)), flags)

    def clip(self, clipping: Clipping, step: int, **options: Any) -> ClipResult:
        """Clip the gradients of step ``step`` (0-based) with the ``options`` of :class:`llmtrain.clipping.Clipping`."""
        if self.parallel.holds_parts:
            options["over"] = self.parallel
        return self.parallel.agree_on(clipping(self.weights, step, **options))

    def _halve(self, size: int, message: str) -> None:
        """Drop the gradients and halve the micro-batch, for this step, which starts again, and all that follow."""
        self.drop_gradients()
        self.unit.forget_graphs()
        self.timer.mark("other")
        self.micro_batch_size = size
        self.on_halved(size, message)

    def update(self, learning_rate: float, skipped: Tensor, divisor: Tensor | None = None) -> None:
        """Update the weights unless ``skipped`` (0-dimensional, 1.0: skip) says otherwise, and drop the gradients.

        ``learning_rate`` is multiplied by the ``lr_multiplier`` of each parameter group; gradients are divided by
        ``divisor``, as clipping asks for.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]
        self.parallel.update(self.optimizer, skipped, divisor)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free the gradients, or zero them where they are kept."""
        if self.keeps_gradients:
            torch._foreach_zero_([weight.grad for _, weight in self.weights if weight.grad is not None])
        else:
            self.parallel.drop_gradients()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators of dropout for one step of one rank: the same at a resume, and other masks on each rank."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
