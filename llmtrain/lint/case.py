"""What the checks look at, and what they say."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch

from llmtrain.accumulation import Accumulation
from llmtrain.accumulation.fixed import FixedBatch
from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.base.runtime import Runtime
from llmtrain.checkpoint.policy import Checkpoint
from llmtrain.clipping import Clipping
from llmtrain.data import Corpus, DataConfig
from llmtrain.lora import Lora
from llmtrain.metrics import MetricsConfig
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.optimizer import OptimizerConfig
from llmtrain.precision import PrecisionConfig
from llmtrain.recovery import RecoveryConfig
from llmtrain.schedule import Schedule
from llmtrain.tokenizer import Tokenizer
from llmtrain.train.config import LoopConfig
from llmtrain.weights import Weights

STRIDES = 10_000  # a run's batch sizes are added up in at most so many pieces


@dataclass(frozen=True)
class Finding:
    """A setting that does not do what it seems to."""

    level: Literal["warning", "error"]
    key: str  # dotted; what to change
    message: str  # ``key=value: what is wrong and why it matters; what would work``


def warning(key: str, message: str) -> Finding:
    """A finding that leaves the run to the user."""
    return Finding("warning", key, message)


def error(key: str, message: str) -> Finding:
    """A finding that makes the run meaningless."""
    return Finding("error", key, message)


class Settings(Protocol):
    """What the checks read of a :class:`llmtrain.run.run.Run`, which is above them."""

    @property
    def run_dir(self) -> str | None: ...
    @property
    def plugins(self) -> list[str]: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def weights(self) -> Weights: ...
    @property
    def lora(self) -> Lora: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def precision(self) -> PrecisionConfig: ...
    @property
    def activation_checkpointing(self) -> ActivationCheckpointing: ...
    @property
    def clipping(self) -> Clipping: ...
    @property
    def accumulation(self) -> Accumulation: ...
    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def recovery(self) -> RecoveryConfig: ...
    @property
    def metrics(self) -> MetricsConfig: ...
    @property
    def runtime(self) -> Runtime: ...
    @property
    def loop(self) -> LoopConfig: ...


class Built(Protocol):
    """What the checks read of the parts that were built of a run."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def corpus(self) -> Corpus: ...
    @property
    def model(self) -> LanguageModel: ...  # may be on the meta device
    @property
    def max_steps(self) -> int: ...
    @property
    def device(self) -> torch.device | None: ...  # None: not chosen yet
    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...  # None: not built yet


@dataclass(frozen=True)
class Case:
    """A run that is about to start."""

    run: Settings
    parts: Built
    overrides: Sequence[str]  # as the user gave them: key=value, group=option
    is_resumed: bool = False

    @cached_property
    def given(self) -> dict[str, str]:
        """The keys that the user has set, with the values as they were written."""
        pairs = (override.lstrip("+").partition("=") for override in self.overrides)
        return {key: value for key, equals, value in pairs if equals}

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.parts.max_steps

    @cached_property
    def sequences(self) -> int:
        """Sequences that the run takes over all its steps."""
        batch_size_at, length = self.run.accumulation.batch_size_at, self.run.data.sequence_length
        stride = max(1, self.steps // STRIDES)
        position = 0
        for step in range(0, self.steps, stride):
            position += min(stride, self.steps - step) * batch_size_at(step, position * length)
        return position

    @property
    def epochs(self) -> float:
        """Passes over the training data."""
        return self.sequences / len(self.parts.corpus.train)

    @cached_property
    def largest_batch(self) -> int:
        """Sequences of the largest optimizer step."""
        batch_size_at, tokens = self.run.accumulation.batch_size_at, self.sequences * self.run.data.sequence_length
        stride = max(1, self.steps // STRIDES)
        return max(batch_size_at(step, tokens * step // self.steps) for step in range(0, self.steps, stride))

    @property
    def batch_key(self) -> str:
        """The key of the batch size."""
        return f"accumulation.{'batch_size' if isinstance(self.run.accumulation, FixedBatch) else 'stages'}"

    @property
    def evaluates(self) -> bool:
        """Whether there will be a validation loss."""
        return self.parts.corpus.validation is not None and self.run.loop.eval_every > 0
