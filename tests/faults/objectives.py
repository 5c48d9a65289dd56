"""Plug-ins of the fault tests: memory that runs out, evaluations that take long or fail, metrics with a password."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.metrics.local import Local
from llmtrain.model import LanguageModel
from llmtrain.objective.causal import Causal

_calls_that_need_more = itertools.count()


@dataclass(frozen=True)
class Hungry(Causal):
    """The device has room for so many sequences; only after ``passing`` calls with more does it notice."""

    room: int
    passing: int

    def __call__(self, model: LanguageModel, inputs: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        loss = super().__call__(model, inputs, targets, segments)
        if len(inputs) > self.room and next(_calls_that_need_more) >= self.passing:
            raise torch.OutOfMemoryError(f"room for {self.room} sequences, not for {len(inputs)}\nand a long report")
        return loss


@dataclass(frozen=True)
class Slow(Causal):
    """Every batch of an evaluation takes a while, and leaves a file ``evaluating``."""

    seconds: float

    def __call__(self, model: LanguageModel, inputs: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        if not model.training:
            Path("evaluating").touch()
            time.sleep(self.seconds)
        return super().__call__(model, inputs, targets, segments)


@dataclass(frozen=True)
class Broken(Causal):
    """Evaluations fail while there is a file ``broken``."""

    message: str

    def __call__(self, model: LanguageModel, inputs: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        if not model.training and Path("broken").exists():
            raise RuntimeError(self.message)
        return super().__call__(model, inputs, targets, segments)


@dataclass(frozen=True)
class Keyed(Local):
    """Metrics that need secrets."""

    api_key: str
    token: str
    options: dict[str, str]
