"""What a step is made of, and making it anew on tensors without data."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.accumulation import Accumulation
from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.clipping import Clipping
from llmtrain.data import DataConfig
from llmtrain.lora import Lora
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.model.layers.skip_init import SkipInitMode
from llmtrain.objective import Objective
from llmtrain.optimizer import OptimizerConfig
from llmtrain.precision import Precision, PrecisionConfig


class Settings(Protocol):
    """What a blueprint reads of a :class:`llmtrain.run.run.Run`, which is above it."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def lora(self) -> Lora: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def precision(self) -> PrecisionConfig: ...
    @property
    def clipping(self) -> Clipping: ...
    @property
    def accumulation(self) -> Accumulation: ...


def outline(settings: Settings, vocab_size: int, labels: Sequence[str]) -> LanguageModel:
    """The model with its head and adapters on the meta device: sizes alone, nothing is allocated."""
    with torch.device("meta"), SkipInitMode():
        model = settings.model.build(vocab_size)
        generator = torch.Generator("cpu")
        settings.objective.attach(model, labels, generator)
        settings.lora.apply(model, generator)
    model.has_base = settings.lora.adapts
    return model


@dataclass
class Built:
    """The parts of a step."""

    model: LanguageModel
    loss_sum: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Blueprint:
    """The settings that one optimizer step follows from; ``precision`` is the arithmetic of the device planned for."""

    settings: Settings
    vocab_size: int
    precision: Precision
    batch_size: int  # sequences of the largest optimizer step
    micro_batch: int | None = None  # sequences of a forward pass; None: as the settings say
    labels: Sequence[str] = ()  # classes of the data

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.settings.data.sequence_length

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a forward pass."""
        return min(self.micro_batch or self.settings.accumulation.micro_batch_size, self.batch_size)

    @property
    def checkpointing(self) -> ActivationCheckpointing | None:
        """What is kept for the backward pass."""
        return getattr(self.settings, "activation_checkpointing", None)

    @property
    def period(self) -> int:
        """After so many blocks the same comes again."""
        is_by_block = getattr(getattr(self.checkpointing, "by", None), "name", None) == "block"
        return getattr(self.checkpointing, "every", 1) if is_by_block else 1

    @property
    def num_layers(self) -> int | None:
        """Blocks of the model; None where its config does not say."""
        return getattr(self.settings.model, "num_layers", None)

    def build(self, device: torch.device, num_layers: int | None = None) -> Built:
        """Model, objective and optimizer on ``device``, with ``num_layers`` blocks (None: all); within a fake mode."""
        config: Any = self.settings.model
        if num_layers is not None:
            config = dataclasses.replace(config, num_layers=num_layers)
        generator = torch.Generator(device)
        with SkipInitMode():
            with torch.device(device):
                model: LanguageModel = config.build(self.vocab_size)
            model.initialise(generator)  # makes what is neither parameter nor argument
            self.settings.objective.attach(model, self.labels, generator)
            self.settings.lora.apply(model, generator)
        optimizer = self.settings.optimizer.build(model)
        if self.checkpointing is not None:
            self.checkpointing.apply(model)
        model.train()
        return Built(model, partial(self.settings.objective, model), optimizer)
