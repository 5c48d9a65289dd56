"""Optimizers: each option describes one and builds it over a model's parameters."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from llmtrain.base.options import Option


class Trainable(Protocol):
    """The view that an optimizer has of what it trains: a training unit."""

    @property
    def num_layers(self) -> int: ...

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by name."""
        ...

    def layer_index(self, name: str) -> int:
        """Depth of a parameter: 0 embeddings, i + 1 block i, ``num_layers + 1`` final norm and heads."""
        ...


class OptimizerConfig(Option, ABC):
    """Contract of ``optimizer=...``.

    ``lr`` is the peak learning rate.  Every parameter group that :meth:`build` makes holds ``lr_multiplier``
    (a float: the loop sets ``group["lr"] = schedule(step) * group["lr_multiplier"]`` before each step) and
    ``names`` (the parameters' names, in the order of ``group["params"]``).

    Our options make their state, all zeros, when they are built and not at the first step: what the run needs in
    memory is taken before it starts, and a checkpoint holds the same entries at every step.
    """

    lr: float

    @abstractmethod
    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        """Build the optimizer over the trainable parameters of ``unit``, on the device they are on."""


def update(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Update the parameters, unless ``found_inf`` says that the gradients are not finite.

    ``found_inf`` is a 0-dimensional fp32 tensor on the parameters' device: 1.0 refuses the step, which then changes
    neither weights nor state, and 0.0 allows it.

    Optimizers that heed torch's ``found_inf`` attribute decide on the device (the fused Adam, AdamW and SGD; our
    Lion and the AdamW of few bits).  For the others (Muon, Adafactor, unfused ones) the host waits once to read
    ``found_inf``.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif not found_inf.item():
        optimizer.step()
