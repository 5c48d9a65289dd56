"""Optimizers: each option describes one and builds it over a model's parameters."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from llmtrain.base.options import Option


class Trainable(Protocol):
    """The view that an optimizer has of what it trains: a training unit."""

    @property
    def num_layers(self) -> int: ...

    @property
    def trained_names(self) -> Sequence[str]:
        """The names of all trained parameters, also of those that other ranks hold."""
        ...

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by name."""
        ...

    def layer_index(self, name: str) -> int:
        """Depth of a parameter: 0 embeddings, i + 1 block i, ``num_layers + 1`` final norm and heads."""
        ...


@runtime_checkable
class ShardedTrainable(Trainable, Protocol):
    """The same view where this rank holds a part of each parameter: a box of it, and a tensor of that shape."""

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        ...

    def first_element(self, name: str) -> int:
        """Number, in the whole parameter, of the first element of this rank's part."""
        ...

    def gather(self, name: str, part: Tensor) -> Tensor:
        """Put together the whole tensor from each rank's ``part``, which lies as the parameter; all ranks call this."""
        ...

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of ``whole``, a view: the inverse of :meth:`gather`."""
        ...


class OptimizerConfig(Option, ABC):
    """Contract of ``optimizer=...``.

    ``lr`` is the peak learning rate.  Every parameter group that :meth:`build` makes holds ``lr_multiplier``
    (a float: the loop sets ``group["lr"] = schedule(step) * group["lr_multiplier"]`` before each step) and
    ``names`` (the parameters' names, in the order of ``group["params"]``).

    Our options make their state, all zeros, when they are built and not at the first step: what the run needs in
    memory is taken before it starts, and a checkpoint holds the same entries at every step.
    """

    takes_shards: ClassVar[bool] = False  # True: the update is right where a rank holds a part of each parameter
    is_elementwise: ClassVar[bool] = False  # True: also where the part is any stretch of the flattened parameter

    lr: float

    @abstractmethod
    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        """Build the optimizer over the trainable parameters of ``unit``, on the device they are on."""


def update(optimizer: torch.optim.Optimizer, found_inf: Tensor, divisor: Tensor | None = None) -> None:
    """Update the parameters, unless ``found_inf`` says that the gradients are not finite.

    ``found_inf`` is a 0-dimensional fp32 tensor on the parameters' device: 1.0 refuses the step, which then changes
    neither weights nor state, and 0.0 allows it.  ``divisor``, another one: all gradients are divided by it.  The
    gradients are of no use afterwards.

    Optimizers that follow torch's convention, the attributes ``found_inf`` and ``grad_scale``, decide and divide on the
    device: every option on a GPU.  For others (on a CPU: Adafactor; unfused ones of torch's) the host reads
    ``found_inf``.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf, optimizer.grad_scale = found_inf, divisor  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
    elif not found_inf.item():
        divide_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]], divisor)
        optimizer.step()


def divide_gradients(parameters: Sequence[Tensor], divisor: Tensor | None) -> None:
    """Divide the gradients of ``parameters`` by ``divisor`` in place; None: by 1."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if divisor is not None and gradients:
        torch._foreach_div_(gradients, divisor)


@contextmanager
def undone_if(skipped: Tensor | None, *tensors: Tensor) -> Iterator[None]:
    """Context: give ``tensors`` their present values again at its end if the 0-dimensional ``skipped`` is True.

    The host does not learn which; None: never.
    """
    before = [] if skipped is None else [tensor.detach().clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=False):
        assert skipped is not None
        torch.where(skipped, old, tensor, out=tensor)
