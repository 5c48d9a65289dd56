"""Plug-ins of the fault tests: memory that runs out, evaluations that take long or fail, metrics with a password."""

import itertools
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import Batch
from llmtrain.metrics.local import Local
from llmtrain.model import LanguageModel
from llmtrain.objective.causal import Causal, CausalUnit

_calls_that_need_more = itertools.count()


class FaultyUnit(CausalUnit):
    """The unit of a :class:`Faulty` objective, which acts at each of its calls."""

    objective: "Faulty"

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.objective.before(batch, training=self.training)
        return super().forward(batch)


class Faulty(Causal):
    """Next-token prediction with a fault."""

    def build(
        self,
        model: LanguageModel,
        labels: Sequence[str],
        generators: NamedGenerators | None,
        class_weights: Sequence[float] = (),
    ) -> FaultyUnit:
        unit = FaultyUnit(model, self.loss, self.z_loss, self.chunk_tokens)
        unit.objective = self
        return unit

    @abstractmethod
    def before(self, batch: Batch, *, training: bool) -> None:
        """Act before the losses are computed."""


@dataclass(frozen=True)
class Hungry(Faulty):
    """The device has room for so many sequences; only after ``passing`` calls with more does it notice."""

    room: int
    passing: int

    def before(self, batch: Batch, *, training: bool) -> None:
        number = batch.sequences
        if number > self.room and next(_calls_that_need_more) >= self.passing:
            raise torch.OutOfMemoryError(f"room for {self.room} sequences, not for {number}\nand a long report")


@dataclass(frozen=True)
class Slow(Faulty):
    """Every batch of an evaluation takes a while, and leaves a file ``evaluating``."""

    seconds: float

    def before(self, batch: Batch, *, training: bool) -> None:
        if not training:
            Path("evaluating").touch()
            time.sleep(self.seconds)


@dataclass(frozen=True)
class Broken(Faulty):
    """Evaluations fail while there is a file ``broken``."""

    message: str

    def before(self, batch: Batch, *, training: bool) -> None:
        if not training and Path("broken").exists():
            raise RuntimeError(self.message)


@dataclass(frozen=True)
class Keyed(Local):
    """Metrics that need secrets."""

    api_key: str
    token: str
    options: dict[str, str]
