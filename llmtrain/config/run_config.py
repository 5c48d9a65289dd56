"""The config of a run: one field a config group, and what they are put together into.

The only module that knows how the groups fit together.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from llmtrain.accumulation import Accumulation
from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.base.format import size
from llmtrain.base.options import option_name
from llmtrain.base.runtime import Runtime
from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.policy import Checkpoint
from llmtrain.clipping import Clipping
from llmtrain.config.build import build, naming
from llmtrain.config.compose import compose
from llmtrain.config.overrides import search_path
from llmtrain.data import Corpus, DataConfig
from llmtrain.evaluation.loss import LossSum
from llmtrain.lora import Lora
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.metrics import MetricsConfig
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.objective import Objective
from llmtrain.optimizer import OptimizerConfig
from llmtrain.precision import Precision, PrecisionConfig
from llmtrain.recovery import RecoveryConfig
from llmtrain.run.autotune import why_not_compile
from llmtrain.schedule import Schedule
from llmtrain.tokenizer import Tokenizer, TokenizerConfig
from llmtrain.train.config import LoopConfig
from llmtrain.train.state import TrainState
from llmtrain.weights import Weights
from llmtrain.weights.adapters import start_from
from llmtrain.weights.scratch import Scratch

MOVED_BASE = (
    "the weights that adapters were trained on have to be there; if they were moved, say where to: base=DIR (generate, "
    "chat, predict, export, verify), weights.path=DIR (resume)"
)
TARGETS = {  # of the kinds of data, in words
    "text": "every next token of a text",
    "responses": "the tokens of responses",
    "labels": "classes",
}


@dataclass(frozen=True)
class Parts:
    """What a run is put together from, before any directory is made."""

    device: torch.device
    tokenizer: Tokenizer
    corpus: Corpus
    model: LanguageModel
    loss_sum: LossSum  # as tuned: compiled, maybe
    plain_loss_sum: LossSum  # the same, not compiled
    optimizer: torch.optim.Optimizer
    precision: Precision
    max_steps: int


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
    loop: LoopConfig
    overrides: tuple[str, ...] = field(default=(), init=False, compare=False, repr=False)  # what ``compose`` was given

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
        if (step := self.checkpoint.step) is not None:
            raise ValueError(
                f"checkpoint.step={step}: a new run has no checkpoint; go on from one with: llmtrain resume RUN_DIR "
                f"checkpoint.step={step}; or take its weights alone: weights=checkpoint "
                f"weights.path=RUN_DIR/checkpoints/step-{step:08d}"
            )

    # --- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def compose(cls, *overrides: str, config_dir: str | Path | None = None) -> Self:
        """Compose a run from Hydra overrides, as ``llmtrain train`` does.  Raises ValueError for a bad one."""
        run = cls.from_config(compose("train", overrides, config_dir))
        given = overrides if config_dir is None else (*overrides, search_path(config_dir))
        object.__setattr__(run, "overrides", given)  # frozen, but this is no part of the config
        return run

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build and check a run from a plain, resolved config."""
        return build(values, cls, plugins=values.get("plugins") or ())

    # --- assembling ---------------------------------------------------------------------------------------------

    def assemble(self, device: torch.device, *, from_start: bool = True, verify_data: bool = False) -> Parts:
        """Build everything that training needs, on ``device``; writes nothing but the data cache.

        Without ``from_start`` a checkpoint is to follow, and of ``weights`` only what no checkpoint holds is loaded.
        With ``verify_data`` every byte of the data is read and checked again, whatever is remembered of it.
        """
        precision = self.precision.build(device)
        tokenizer = self.tokenizer.build()
        vocab_size = self.vocab_size(tokenizer)
        corpus = self.data.verify(tokenizer) if verify_data else self.data.build(tokenizer)
        generator = torch.Generator(device).manual_seed(self.runtime.seed)
        model = self.make_model(
            vocab_size, corpus.labels, device, generator, load_weights=from_start, class_weights=corpus.class_weights
        )
        precision.apply(model.blocks)
        with naming("activation_checkpointing"):
            self.activation_checkpointing.apply(model)
        with naming("optimizer"):
            optimizer = self.optimizer.build(model)
        with naming("clipping"):
            self.clipping.check_parameters([name for name, p in model.named_parameters() if p.requires_grad])
        plain_loss_sum: LossSum = partial(self.objective, model)
        if self.runtime.compile is True and (reason := why_not_compile(device)):
            raise ValueError(f"runtime.compile=true: {reason}; take auto or false")
        if self.runtime.cuda_graphs and device.type != "cuda":
            raise ValueError("runtime.cuda_graphs=true: there is no GPU here; take false")
        max_steps = self.loop.total_steps(self.accumulation, len(corpus.train), self.data.sequence_length)
        return Parts(device, tokenizer, corpus, model, plain_loss_sum, plain_loss_sum, optimizer, precision, max_steps)

    def make_model(
        self,
        vocab_size: int,
        labels: Sequence[str],
        device: torch.device,
        generator: torch.Generator,
        *,
        load_weights: bool,
        class_weights: Sequence[float] = (),
    ) -> LanguageModel:
        """The model with what objective and adapters add to it; frozen weights that no checkpoint holds are loaded."""
        model = self.model.create(vocab_size, device, generator)
        if load_weights or self.lora.adapts:
            with contextlib.nullcontext() if load_weights else noting(MOVED_BASE):
                self.weights.load(model)
        with naming("objective"):
            self.objective.attach(model, labels, generator, class_weights)
        with naming("lora"):
            self.lora.apply(model, generator)
            if load_weights and isinstance(self.lora, LowRankAdaptation) and self.lora.path is not None:
                start_from(model, self.lora, Path(self.lora.path))
        model.has_base = self.lora.adapts
        return model

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """The model's vocabulary.  Raises ValueError if the tokenizer has ids beyond it."""
        if self.model.vocab_size is None:
            return tokenizer.vocab_size
        if self.model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids; "
                f"take null for the tokenizer's, or at least {tokenizer.vocab_size}"
            )
        return self.model.vocab_size

    def first_state(self, parts: Parts) -> TrainState:
        """The state of a run at step 0."""
        base = self.weights.fingerprint() if self.lora.adapts else ""
        return TrainState(data=parts.corpus.fingerprint, labels=list(parts.corpus.labels), base=base)

    def check_base(self, state: TrainState) -> None:
        """Raise ValueError if the weights that adapters stand on are not those that they were trained on."""
        if not self.lora.adapts:
            return
        with noting(MOVED_BASE):
            if state.base != self.weights.fingerprint():
                path = getattr(self.weights, "path", "")
                raise ValueError(f"weights.path={path}: not the weights that the adapters were trained on")

    def check_space(self, parts: Parts) -> None:
        """Refuse a run whose checkpoints cannot fit on the disk."""
        place = Path(self.run_dir or self.output_dir).absolute()
        while not place.exists():
            place = place.parent
        needed = self.checkpoint_bytes(parts) * (self.checkpoint.kept() + 1)  # one more, while it is written
        free = shutil.disk_usage(place).free
        if free < needed:
            raise ValueError(
                f"{place}: {size(free)} free, the checkpoints of this run need {size(needed)}; "
                "make room, or name another place: output_dir=DIR"
            )

    def checkpoint_bytes(self, parts: Parts) -> int:
        """What a checkpoint takes, of disk and of host memory while it is written."""
        tensors = [*saved_tensors(parts.model).values(), *state_tensors(parts.optimizer).values()]
        return sum(tensor.nbytes for tensor in tensors)


@contextlib.contextmanager
def noting(remedy: str) -> Iterator[None]:
    """Add ``remedy`` to the message of a user's mistake."""
    try:
        yield
    except ValueError as error:
        error.add_note(remedy)
        raise
