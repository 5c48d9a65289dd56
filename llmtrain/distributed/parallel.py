"""The contract between a training step and the way in which ranks share its unit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmtrain.base.places import Places
from llmtrain.base.world import Alone, World
from llmtrain.clipping import ClipResult
from llmtrain.data import Batch
from llmtrain.objective import TrainingUnit
from llmtrain.optimizer import Trainable, update
from llmtrain.precision import Precision


class Parallel:
    """One process that trains a unit alone; the base of the ways in which several ranks share one.

    The optimizer, the clipping and the checkpoints see :meth:`weights`: plain tensors, of which this rank may hold a
    part.  Losses are sums over the rank's part of a batch divided by the counts of the whole step, and gradients are
    summed over the ranks, so that a step is the same on any number of them.
    """

    holds_parts: ClassVar[bool] = False  # True: :meth:`weights` of some parameters are parts of them
    keeps_casts: ClassVar[bool] = True  # False: whole weights do not outlive a pass, so no cast of them can be kept

    def __init__(self, unit: TrainingUnit, world: World | None = None) -> None:
        self.unit = unit
        self.world: World = world or Alone()

    @property
    def data_rank(self) -> int:
        """This rank's number among those that train on different sequences."""
        return 0

    @property
    def data_size(self) -> int:
        """The number of ranks that train on different sequences."""
        return 1

    @property
    def seed_rank(self) -> int:
        """This rank's number among those that draw different random numbers, as for dropout."""
        return self.data_rank

    @property
    def trainable(self) -> Trainable:
        """The view that an optimizer is built over: names and this rank's part of every parameter."""
        return self.unit

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer into use that has been built over :attr:`trainable`."""

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters as this rank holds them, by the names that they have in checkpoints."""
        return self.unit.trained_weights()

    def held(self) -> Mapping[str, Tensor]:
        """This rank's parts of the parameters that :meth:`places` names, trained or not."""
        places = self.places()
        return {name: weight for name, weight in self.trainable.named_weights() if name in places} if places else {}

    def places(self) -> Places:
        """The boxes of the parameters that this rank holds a part of, by name; those not named it holds as a whole.

        No box, (): other ranks hold the whole parameter.
        """
        return {}

    def run_all(self, micro_batches: Iterator[Batch], precision: Precision) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Run forward and backward of all micro-batches of a step in an order of its own.

        Returns the losses, whole and by name, of this rank's part.  None, and nothing is run: the caller runs one after
        the other, by the methods below.
        """
        return None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of the losses of this rank's ``batch``, for :func:`backward`; see :class:`TrainingUnit`."""
        return self.unit(batch)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of ``loss`` to those of the step; after the last call they are summed over the ranks.

        Every rank makes equally many calls of :meth:`forward` and this in a step.
        """
        loss.backward()

    def prepare(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch's forward and backward pass; ``is_last``: of the step."""
        return nullcontext()

    @property
    def is_compilable(self) -> bool:
        """False: the unit cannot be compiled, as where hooks of its modules gather weights."""
        return True

    def update(self, optimizer: torch.optim.Optimizer, skipped: Tensor, divisor: Tensor | None) -> None:
        """Update :meth:`weights` by ``optimizer``, as :func:`llmtrain.optimizer.update` does, for the next pass."""
        update(optimizer, skipped, divisor)

    def use_loaded(self) -> None:
        """Compute with the values that a checkpoint has given :meth:`held`; every rank calls this."""

    def drop_gradients(self) -> None:
        """Free all gradients."""
        self.unit.zero_grad(set_to_none=True)

    def agree_on(self, clip: ClipResult) -> ClipResult:
        """The measurements of this rank's clipping as all ranks are to have them."""
        return clip

    def after_update(self, step: int, *, is_last: bool) -> dict[str, Tensor]:
        """Exchange what ranks exchange after an update; ``step``: steps done, ``is_last``: the run ends with it.

        Returns numbers for the metrics by name, 0-dimensional on the device.
        """
        return {}

    def sum_losses(self, losses: Tensor, flags: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Sum ``losses`` ``(losses,)`` over the parts of a step, and ``flags`` ``(flags,)`` over all ranks, at once."""
        if self.world.size == 1:
            return losses, flags
        own = losses * (self.data_size / self.world.size)  # of all ranks with the same sequences together: once
        both = self.world.sum(own if flags is None else torch.cat([own, flags.to(own)]))
        return both[: len(losses)], None if flags is None else both[len(losses) :]

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks that have different sequences, in their dtype."""
        own = values.double() * (self.data_size / self.world.size)
        return (
            self.world.sum(own).to(values.dtype)
            if values.is_floating_point()
            else self.world.sum(own).round().to(values.dtype)
        )

    def sum_of_squares(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        """Sum ``squares`` ``(parameters,)``, of the elements that this rank holds of each, over the whole tensors."""
        return squares

    def largest(self, value: Tensor) -> Tensor:
        """The largest ``value``, 0-dimensional, of all ranks; NaN if one of them is."""
        return value

    def total_norm(self, norms: Tensor, names: Sequence[str]) -> Tensor:
        """The norm of all parameters together from the ``norms`` ``(parameters,)`` of those that this rank holds."""
        return torch.linalg.vector_norm(norms)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Context in which the model of the unit can be called by one rank alone, as for samples of text.

        Every rank enters and leaves it at the same place.
        """
        return nullcontext()

    def scoring(self) -> AbstractContextManager[None]:
        """Context of an evaluation's calls of ``unit.score``, of which every rank makes equally many."""
        return nullcontext()
