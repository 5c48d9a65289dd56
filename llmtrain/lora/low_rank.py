"""The shared keys of LoRA, rsLoRA and DoRA, and the insertion of their adapters into a model."""

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from llmtrain.base.checks import pattern, pattern_matches, positive
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.options import option_name
from llmtrain.lora import Lora
from llmtrain.lora.layers import Adapter, FrozenLinear, LoraEmbedding, LoraHead, LoraLinear
from llmtrain.lora.quantization import Quantization
from llmtrain.lora.targets import EMBEDDING, HEAD, block_linears, exchange, find_targets
from llmtrain.model import LanguageModel
from llmtrain.model.initial_values import initialise_own


@dataclass(frozen=True)
class LowRankAdaptation(Lora):
    """Adapters ``B A`` of ``rank`` on the weights that ``targets`` names; the model's own weights are frozen."""

    adapts: ClassVar[bool] = True
    has_magnitude: ClassVar[bool] = False

    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    also_train: list[str]
    quantization: Quantization
    path: str | None

    def __post_init__(self) -> None:
        positive(rank=self.rank, alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if not self.targets:
            raise ValueError("targets=[]: nothing would be adapted; take [all-linear]")
        for i, part in enumerate(self.also_train):
            pattern(f"also_train[{i}]", part)

    @property
    def kind(self) -> str:
        """The name of the option: lora, rslora or dora."""
        return option_name(self)

    @property
    @abstractmethod
    def scaling(self) -> float:
        """The factor on ``B A``."""

    def apply(self, model: LanguageModel, generators: NamedGenerators | None) -> None:
        """Freeze and quantise weights and insert adapters; parameters keep their names, adapters add theirs."""
        targets = find_targets(model, self.targets)
        linears = block_linears(model)
        if HEAD in targets and self.dropout:
            raise ValueError(
                f"dropout={self.dropout}: applies to an adapter's input, but the head's is added to its matrix; "
                f"take dropout=0.0, or leave {HEAD} out of targets"
            )
        if self.dropout and not any(name in linears for name in targets):
            raise ValueError(f"dropout={self.dropout}: adapters of embeddings have no dropout; take dropout=0.0")
        self._freeze(model)
        for name, linear in linears.items():
            packed = None
            if not linear.weight.requires_grad:
                packed = self.quantization.pack(linear.weight)
            if name in targets:
                exchange(model, name, self._adapt(name, LoraLinear(linear, packed), generators, self.dropout))
            elif packed is not None:
                exchange(model, name, FrozenLinear(linear, packed))
        for name in targets:
            module = model.get_submodule(name)
            if isinstance(module, nn.Embedding):
                rows = model.vocab_size if name == EMBEDDING else module.num_embeddings
                exchange(model, name, self._adapt(name, LoraEmbedding(module, rows), generators))
            elif not isinstance(module, Adapter):
                assert isinstance(module, nn.Linear)
                exchange(model, name, self._adapt(name, LoraHead(module, model.vocab_size), generators))

    def _adapt(self, name: str, layer: Adapter, generators: NamedGenerators | None, dropout: float = 0.0) -> nn.Module:
        layer.adapt(self.rank, self.scaling, dropout)
        if generators is not None:
            initialise_own(layer, name, generators)
        if self.has_magnitude:
            layer.add_magnitude()
        return layer

    def _freeze(self, model: LanguageModel) -> None:
        names = [name for name, _ in model.named_parameters()]
        for i, part in enumerate(self.also_train):
            if part == HEAD and not hasattr(model, HEAD):
                raise ValueError(
                    f"also_train[{i}]={part}: this model's output layer is its embedding, which would be trained too; "
                    f"take {EMBEDDING} if that is meant"
                )
            pattern_matches(f"also_train[{i}]", part, names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(re.search(part, name) for part in self.also_train))
