"""The contract of modules that a model does not know, and that know the initial values of their parameters."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmtrain.base.named_generators import NamedGenerators


class InitialValues(ABC):
    """A base class of modules with initial values of their own, such as adapters and heads."""

    filled: ClassVar[tuple[str, ...]]  # the parameters of the module itself that :meth:`fill` knows

    @abstractmethod
    def fill(self, key: str, whole: Tensor, generator: torch.Generator) -> None:
        """Fill ``whole``, of the shape of the whole parameter ``key``, with its initial values."""

    def set_buffers(self, device: torch.device) -> None:  # noqa: B027 (not every module has buffers)
        """Set the buffers of the module itself, which follow from its configuration, on ``device``."""


@torch.no_grad()
def initialise_own(module: nn.Module, name: str, generators: NamedGenerators) -> None:
    """Fill the parameters that ``module``, which has the ``name`` in checkpoints, knows the initial values of.

    Those on the meta device are filled when they have their memory.
    """
    assert isinstance(module, InitialValues)
    for key in module.filled:
        parameter = module.get_parameter(key)
        if not parameter.is_meta:
            module.fill(key, parameter, generators.of(f"{name}.{key}", parameter.device))
