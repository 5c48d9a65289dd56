"""Schedules: the orders in which a pipeline runs the forward and backward passes of a step's micro-batches.

They are those of torch.distributed.pipelining; here they get micro-batches that they can run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from llmtrain.data import IGNORE, Batch
from llmtrain.distributed.pipeline_group import PipelineGroup
from llmtrain.distributed.pipeline_options import passes_needed
from llmtrain.distributed.stages import Division, Stage

SINGLE: Mapping[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}  # of one stage on each rank
SEVERAL: Mapping[str, Any] = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}
MAX_SHAPES = 64  # whose schedules are kept: the buffers of a schedule take memory


def fit_batches(batches: Sequence[Batch], name: str, processes: int) -> list[Batch]:
    """The micro-batches ``batches`` of a step in one shape, and fillers until the schedule ``name`` can run them.

    Rows and tokens that are added are no targets.
    """
    missing = passes_needed(name, processes, len(batches)) - len(batches)
    batches = [*batches, *[batches[0].filler()] * missing]
    rows = max(batch.sequences for batch in batches)
    lengths = {name: max(batch.tensors[name].shape[1] for batch in batches) for name in batches[0].lengths}
    return [_padded(batch, rows, lengths) for batch in batches]


def _padded(batch: Batch, rows: int, lengths: Mapping[str, int]) -> Batch:
    tensors = dict(batch.tensors)
    for name, tensor in batch.tensors.items():
        missing_rows = rows - len(tensor)
        missing = lengths[name] - tensor.shape[1] if name in lengths else 0
        if missing_rows or missing:
            padding = [0, 0] * (tensor.dim() - 2) + [0, missing] * (tensor.dim() > 1) + [0, missing_rows]
            tensors[name] = F.pad(tensor, padding, value=IGNORE if name == "targets" else 0)
    return replace(batch, tensors=tensors)


@dataclass(frozen=True)
class Shape:
    """The shape of the micro-batches of a step, for which a schedule is made."""

    passes: int
    rows: int
    length: int
    dtype: torch.dtype  # of the hidden states between stages


class Schedules:
    """The schedules of one rank's stages, one for each shape of a step."""

    def __init__(
        self,
        name: str,
        stages: Sequence[Stage],
        division: Division,
        ranks: PipelineGroup,
        hidden_size: int,
        has_gradient: Sequence[bool],
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        """``has_gradient``: of the input of each stage of the unit; ``scale``: of a micro-batch's loss."""
        self.name = name
        self.stages = stages
        self.division = division
        self.ranks = ranks
        self.hidden_size = hidden_size
        self.has_gradient = has_gradient
        self.scale = scale
        self._made: dict[Shape, Any] = {}

    def run(self, shape: Shape) -> list[Tensor]:
        """Run the passes of a step, of the work that the stages have; the results of the last stage, if it is here.

        The gradients are sums over the micro-batches.
        """
        if shape not in self._made:
            if len(self._made) >= MAX_SHAPES:
                self._made.clear()
            self._made[shape] = self._make(shape)
        results: list[Tensor] = []
        self._results = results
        numbers = torch.arange(shape.passes)
        try:
            self._made[shape].step(number=numbers, target=numbers, return_outputs=False)
        except RuntimeError as error:
            # torch's own message lists tensors; its cause is the error
            raise error.__cause__ if isinstance(error.__cause__, Exception) else error from None
        return results

    def _make(self, shape: Shape) -> Any:
        stages = [self._stage(stage, shape) for stage in self.stages]
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}  # losses are sums, not means
        if self.name in SINGLE:
            (stage,) = stages
            return SINGLE[self.name](stage, shape.passes, **options)
        return SEVERAL[self.name](stages, shape.passes, **options)

    def _stage(self, stage: Stage, shape: Shape) -> PipelineStage:
        """The stage with the shapes of what it takes and gives: then nothing is pickled to find them out."""
        last = self.division.stages - 1
        inputs = () if stage.is_first else (self._hidden(shape, requires_grad=self.has_gradient[stage.index]),)
        result = torch.empty((), device="meta", requires_grad=True)
        outputs = result if stage.is_last else self._hidden(shape, requires_grad=self.has_gradient[stage.index + 1])
        # The loss has the gradient of the output layer at once, and frees it: its backward pass runs once, as a whole.
        whole = (lambda: _nothing) if stage.is_last else None
        return PipelineStage(
            stage, stage.index, last + 1, self.ranks.device, input_args=inputs, output_args=outputs,
            group=self.ranks.group, dw_builder=whole,
        )  # fmt: skip

    def _hidden(self, shape: Shape, *, requires_grad: bool) -> Tensor:
        size = shape.rows, shape.length, self.hidden_size
        return torch.empty(size, dtype=shape.dtype, device="meta", requires_grad=requires_grad)

    def _loss(self, losses: Tensor, _: Tensor) -> Tensor:
        self._results.append(losses.detach())
        return self.scale(losses[0].clone())  # zero_bubble detaches it in place, which a view cannot be


def _nothing() -> None:
    pass
