"""The run that the checks read, and the findings that they give."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from llmtrain.base.options import RunFacts
from llmtrain.config.assemble import Parts
from llmtrain.config.run_config import RunConfig
from llmtrain.data import Corpus
from llmtrain.objective import TrainingUnit
from llmtrain.tokenizer import Tokenizer
from llmtrain.train.length import TrainingLength


@dataclass(frozen=True)
class Finding:
    """A setting that does not do what it seems to."""

    level: Literal["warning", "error"]
    key: str  # dotted; what to change
    message: str  # ``key=value: what is wrong and why it matters; what would work``


def warning(key: str, message: str) -> Finding:
    """Make a finding that leaves the decision to the user."""
    return Finding("warning", key, message)


def error(key: str, message: str) -> Finding:
    """Make a finding that makes the run meaningless, so that it is refused."""
    return Finding("error", key, message)


@dataclass(frozen=True)
class Case:
    """A run that is about to start, as far as it has been built."""

    run: RunConfig
    tokenizer: Tokenizer
    corpus: Corpus
    unit: TrainingUnit  # may be on the meta device
    length: TrainingLength
    device: torch.device | None = None  # None: not chosen yet
    optimizer: torch.optim.Optimizer | None = None  # None: not built yet
    overrides: Sequence[str] = ()  # the keys that the user has set, as written: key=value, group=option
    is_resumed: bool = False

    @classmethod
    def of(cls, run: RunConfig, parts: Parts, overrides: Sequence[str]) -> "Case":
        return cls(
            run, parts.tokenizer, parts.corpus, parts.unit, parts.length, parts.device, parts.optimizer, overrides
        )

    @cached_property
    def given(self) -> dict[str, str]:
        """The keys that the user has set, with the values as they were written."""
        pairs = (override.lstrip("+").partition("=") for override in self.overrides)
        return {key: value for key, equals, value in pairs if equals}

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.length.max_steps

    @property
    def sequences(self) -> int:
        """Sequences of all steps of the run."""
        return self.length.sequences

    @property
    def epochs(self) -> float:
        """Passes over the training data."""
        return self.sequences / len(self.corpus.train)

    @property
    def largest_batch(self) -> int:
        """Sequences of the largest optimizer step."""
        return self.length.largest_batch

    @cached_property
    def facts(self) -> RunFacts:
        """The facts from which options know which of their keys are read."""
        validation = self.corpus.validation
        return RunFacts(
            self.max_steps, self.length.tokens, self.epochs, self.largest_batch,
            self.corpus.train.tokens, None if validation is None else validation.tokens, self.evaluates,
        )  # fmt: skip

    @property
    def batch_key(self) -> str:
        return f"accumulation.{self.run.accumulation.batch_size_key}"

    @property
    def evaluates(self) -> bool:
        """True if the run has a validation loss."""
        return self.corpus.validation is not None and self.run.loop.eval_every > 0
