"""One optimizer step: gradients of a batch, micro-batch by micro-batch, and the update."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.data import Batch
from llmtrain.objective import TrainingUnit, mean_losses
from llmtrain.optimizer import update
from llmtrain.precision import Precision
from llmtrain.train.out_of_memory import halve_on_out_of_memory


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
    ) -> None:
        self.unit = unit
        self.optimizer = optimizer
        self.precision = precision
        self.micro_batch_size = micro_batch_size  # sequences of a forward pass at most; halved when memory runs out
        self.timer: Timer = timer or NoTimer()
        self.on_halved = on_halved  # called with the new size and the error's message
        self.weights = unit.trained_weights()
        self.keeps_gradients = keeps_gradients
        if keeps_gradients:
            for _, weight in self.weights:
                weight.grad = torch.zeros_like(weight)

    def gradients(self, batch: Batch) -> StepLoss:
        """Run forward and backward of every micro-batch, in smaller ones when memory runs out; unscale the gradients.

        Each micro-batch adds (its sums of losses) / (valid targets of the whole step), so any split of the batch gives
        the gradient of the whole.
        """
        loss = halve_on_out_of_memory(
            lambda size: self.accumulate(batch, size), min(self.micro_batch_size, batch.sequences), self._halve
        )
        self.precision.unscale([parameter for _, parameter in self.weights])
        return loss

    def accumulate(self, batch: Batch, micro_batch_size: int) -> StepLoss:
        """Run forward and backward of ``batch`` in parts of ``micro_batch_size`` sequences."""
        with self.precision.constant_weights(passes=math.ceil(batch.sequences / micro_batch_size)):
            return self._accumulate(batch.split(micro_batch_size))

    def _accumulate(self, micro_batches: Iterator[Batch]) -> StepLoss:
        total: Tensor | None = None
        parts: dict[str, Tensor] = {}
        for micro_batch in micro_batches:
            with self.precision.autocast():
                loss, losses = mean_losses(self.unit, self.unit.fit_shape(micro_batch))
            self.timer.mark("forward")
            self.precision.scale(loss).backward()
            self.timer.mark("backward")
            loss = loss.detach()
            total = loss if total is None else total + loss
            for name, part in losses.items():
                parts[name] = part.detach() if name not in parts else parts[name] + part.detach()
        assert total is not None
        return StepLoss(total, parts)

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
        update(self.optimizer, skipped, divisor)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free the gradients, or zero them where they are kept."""
        if self.keeps_gradients:
            torch._foreach_zero_([weight.grad for _, weight in self.weights if weight.grad is not None])
        else:
            self.optimizer.zero_grad(set_to_none=True)
