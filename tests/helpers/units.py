"""Training units around models, for what takes a unit and not a model."""

from collections.abc import Iterator
from typing import Any, overload

from torch import nn

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.model import LanguageModel
from llmtrain.objective import TrainingUnit
from llmtrain.objective.causal import Causal
from llmtrain.optimizer import Trainable


class PlainUnit:
    """The view of an optimizer of any module.  Without a ``layer_index`` of its own the module is one block."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def num_layers(self) -> int:
        return int(getattr(self.module, "num_layers", 1))

    @property
    def trained_names(self) -> list[str]:
        return [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.module.named_parameters()

    def layer_index(self, name: str) -> int:
        return int(self.module.layer_index(name)) if hasattr(self.module, "layer_index") else 1


@overload
def as_unit(model: LanguageModel) -> TrainingUnit: ...
@overload
def as_unit(model: nn.Module) -> Trainable: ...
def as_unit(model: nn.Module) -> TrainingUnit | Trainable:
    """A unit around ``model``: of a language model the one of next-token prediction, of others :class:`PlainUnit`."""
    if not isinstance(model, LanguageModel):
        return PlainUnit(model)
    return Causal(z_loss=0.0, chunk_tokens=None).build(model, (), NamedGenerators(0))
