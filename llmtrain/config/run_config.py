"""The config of a run: one field for each config group, and the checks between groups."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from llmtrain.accumulation import Accumulation
from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.base.options import option_name
from llmtrain.base.runtime import Runtime
from llmtrain.checkpoint.policy import Checkpoint
from llmtrain.clipping import Clipping
from llmtrain.config.build import build, naming
from llmtrain.config.compose import compose
from llmtrain.config.explain import explain_composition
from llmtrain.config.overrides import search_path
from llmtrain.config.stored_config import ConfigError
from llmtrain.data import DataConfig
from llmtrain.data.sequences import Sequences
from llmtrain.distributed.options import Distributed
from llmtrain.lora import Lora
from llmtrain.metrics import MetricsConfig
from llmtrain.model import ModelConfig
from llmtrain.objective import Objective
from llmtrain.optimizer import OptimizerConfig
from llmtrain.precision import PrecisionConfig
from llmtrain.recovery import RecoveryConfig
from llmtrain.schedule import Schedule
from llmtrain.tokenizer import Tokenizer, TokenizerConfig
from llmtrain.train.config import LoopConfig
from llmtrain.train.length import TrainingLength, measure
from llmtrain.weights import Weights
from llmtrain.weights.scratch import Scratch

TARGETS = {  # of each kind of data, in words
    "text": "every next token of a text",
    "responses": "the tokens of responses",
    "labels": "classes",
}


@dataclass(frozen=True)
class RunConfig:
    """A composed, checked run."""

    name: str
    output_dir: str
    run_dir: str | None
    plugins: list[str]
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    objective: Objective
    weights: Weights
    lora: Lora
    optimizer: OptimizerConfig
    schedule: Schedule
    precision: PrecisionConfig
    activation_checkpointing: ActivationCheckpointing
    clipping: Clipping
    accumulation: Accumulation
    checkpoint: Checkpoint
    recovery: RecoveryConfig
    metrics: MetricsConfig
    runtime: Runtime
    distributed: Distributed
    loop: LoopConfig
    overrides: tuple[str, ...] = field(default=(), init=False, compare=False, repr=False)  # those of ``compose``

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.context_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length}: longer than model.context_length="
                f"{self.model.context_length}; data.sequence_length={self.model.context_length}"
                + (", or a longer model.context_length" if isinstance(self.weights, Scratch) else " or less")
            )
        if self.runtime.cuda_graphs and getattr(self.activation_checkpointing, "offload", False):
            raise ValueError(
                "runtime.cuda_graphs=true: does not go with activation_checkpointing.offload=true, whose copies no "
                "graph can hold; take one of them"
            )
        if self.data.gives not in self.objective.takes:
            raise ValueError(
                f"objective={option_name(self.objective)}: does not go with data={option_name(self.data)}, "
                f"whose targets are {TARGETS[self.data.gives]}; it takes data whose targets are "
                f"{' or '.join(TARGETS[kind] for kind in self.objective.takes)}"
            )
        if self.lora.adapts and isinstance(self.weights, Scratch):
            raise ValueError(
                f"lora={option_name(self.lora)}: adapters on random weights learn nothing; name the weights to adapt, "
                "weights=huggingface weights.path=DIR, or weights=checkpoint weights.path=RUN_DIR; or train all of "
                "them: lora=none"
            )
        with naming("schedule"):
            self.schedule.check_peak(self.optimizer.lr)

    @classmethod
    def compose(cls, *overrides: str, config_dir: str | Path | None = None) -> Self:
        """Compose a run from Hydra overrides, as ``llmtrain train`` does.  Raises ValueError for one that is wrong."""
        try:
            values = compose("train", overrides, config_dir)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain_composition(error, "train")) from error
        run = cls.from_config(values)
        given = overrides if config_dir is None else (*overrides, search_path(config_dir))
        object.__setattr__(run, "overrides", given)  # frozen, but this is no part of the config
        return run

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build and check a run from a plain, resolved config."""
        return build(values, cls, plugins=values.get("plugins") or ())

    def length(self, sequences: Sequences, *, short: int = 0) -> TrainingLength:
        """The length of the run over its training data ``sequences``; ``short``: see :func:`measure`."""
        seed, shuffle = self.runtime.seed, self.data.shuffle
        return measure(self.loop, self.accumulation, sequences, seed, shuffle=shuffle, short=short)

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """The model's vocabulary.  Raises ValueError if the tokenizer has ids beyond it."""
        if self.model.vocab_size is None:
            return tokenizer.vocab_size
        if self.model.vocab_size < tokenizer.vocab_size:
            remedy = f"take null for the tokenizer's, or at least {tokenizer.vocab_size}"
            if not isinstance(self.weights, Scratch):
                remedy = (
                    "the weights are of another tokenizer: take the one that they were trained with, "
                    "tokenizer=huggingface tokenizer.path=DIR (tokenizer=sentencepiece for a tokenizer.model)"
                )
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size}: tokenizer={option_name(self.tokenizer)} has "
                f"{tokenizer.vocab_size} ids; {remedy}"
            )
        return self.model.vocab_size

    def build_tokenizer(self, config: TokenizerConfig | None = None) -> Tokenizer:
        """The tokenizer, or that of ``config``, limited to the ids that the model has rows for.

        Published tokenizers may have a few tokens more than their model has rows, as for padding, that no text has.
        """
        tokenizer = (config or self.tokenizer).build()
        rows = self.model.vocab_size
        has_surplus = rows is not None and tokenizer.vocab_size > rows and not isinstance(self.weights, Scratch)
        return (
            tokenizer.limited(rows) if has_surplus and rows is not None and tokenizer.text_size <= rows else tokenizer
        )
