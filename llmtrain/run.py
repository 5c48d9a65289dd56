"""A run: one field a config group.  The only module that knows how the groups fit together.

run = Run.compose("model=tiny", "tokenizer=byte", "loop.max_steps=10")
result = run.train()
"""

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from llmtrain import config
from llmtrain.accumulation import Accumulation
from llmtrain.checkpoint import Checkpoint, restore
from llmtrain.clipping import Clipping
from llmtrain.data import Corpus, DataConfig
from llmtrain.data.loader import Loader
from llmtrain.display import open_display
from llmtrain.format import count, duration, rate, size
from llmtrain.loop import Loop, LoopConfig
from llmtrain.lora import Lora
from llmtrain.metrics import MetricsConfig
from llmtrain.metrics.jsonl import drop_rows, read_metrics
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.objective import Objective
from llmtrain.optimizer import OptimizerConfig
from llmtrain.optimizer.state import state_tensors
from llmtrain.precision import Precision, PrecisionConfig
from llmtrain.run_directory import RunDirectory
from llmtrain.runtime import Runtime, describe_environment, device_name, peak_flops
from llmtrain.schedule import Schedule
from llmtrain.signals import stop_on_signals
from llmtrain.state import TrainState
from llmtrain.storage import sweep_leftovers, write_atomically
from llmtrain.tokenizer import Tokenizer, TokenizerConfig
from llmtrain.weights import Weights


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run_dir: Path
    summary: dict[str, Any]  # as summary.json
    model: LanguageModel

    @property
    def exit_reason(self) -> str:
        """``"finished"`` or ``"interrupted"``."""
        return self.summary["exit_reason"]


@dataclass(frozen=True)
class Parts:
    """What a run is put together from, before any directory is made."""

    device: torch.device
    tokenizer: Tokenizer
    corpus: Corpus
    model: LanguageModel
    loss_sum: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    precision: Precision
    max_steps: int


@dataclass(frozen=True)
class Run:
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
    clipping: Clipping
    accumulation: Accumulation
    checkpoint: Checkpoint
    metrics: MetricsConfig
    runtime: Runtime
    loop: LoopConfig

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.context_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length}: longer than model.context_length="
                f"{self.model.context_length}; shorten the one or lengthen the other"
            )
        with config.naming("schedule"):
            self.schedule.check_peak(self.optimizer.lr)

    # --- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def compose(cls, *overrides: str, config_dir: str | Path | None = None) -> Self:
        """Compose a run from Hydra overrides, as ``llmtrain train`` does.  Raises ValueError for a bad one."""
        return cls.from_config(config.compose("train", overrides, config_dir))

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build and check a run from a plain, resolved config."""
        return config.build(values, cls, plugins=values.get("plugins") or ())

    # --- training -----------------------------------------------------------------------------------------------

    def train(self, *, command: Sequence[str] = ()) -> Result:
        """Train from step 0 in a new run directory.

        Everything is checked, the data prepared and the model built before the directory is made.  Raises
        ValueError for what the user can mend, :class:`llmtrain.loop.TrainingFailed` and OSError for a failed run.
        """
        with self.runtime.session() as device:
            self.runtime.seed_everything()
            parts = self.assemble(device)
            self.weights.load(parts.model)
            self.metrics.check()
            self.check_space(parts)
            directory = self.create_directory()
            with directory.lock():
                self.describe(directory, device, command)
                return self.execute(parts, directory, TrainState(data=parts.corpus.fingerprint))

    def resume(self, directory: RunDirectory, *, command: Sequence[str] = (), changes: Sequence[tuple] = ()) -> Result:
        """Continue the run in ``directory`` from its newest checkpoint, or start it if it has none.

        ``changes`` are the values that differ from the stored config; they are recorded.
        """
        with self.runtime.session() as device, directory.lock():
            for folder in (directory.path, directory.checkpoints):
                sweep_leftovers(folder)
            self.runtime.seed_everything()
            parts = self.assemble(device)
            if checkpoints := directory.find_checkpoints():
                state = restore(checkpoints[-1], parts.model, parts.optimizer)
                parts.precision.load_state_dict(state.scaler)
                state.restore_rng(device)
            else:
                state = TrainState(data=parts.corpus.fingerprint)
                self.weights.load(parts.model)
            if state.data != parts.corpus.fingerprint:
                raise ValueError(
                    f"data: not what this run was started on ({parts.corpus.description}); it was edited, moved or "
                    "prepared otherwise, and step and position mean nothing in it; restore it, or start a new run"
                )
            if state.step > parts.max_steps:
                raise ValueError(f"loop.max_steps={parts.max_steps}: the run is at step {state.step} already")
            drop_rows(directory.samples, lambda row: row["step"] > state.step)
            if changes or not directory.environment.exists():
                self.describe(directory, device, command)
            return self.execute(parts, directory, state, resumed=True, changes=changes)

    def create_directory(self) -> RunDirectory:
        """The new run's directory."""
        if self.run_dir is not None:
            return RunDirectory.create_at(Path(self.run_dir))
        return RunDirectory.create(Path(self.output_dir), self.name)

    def describe(self, directory: RunDirectory, device: torch.device, command: Sequence[str]) -> None:
        """Write ``config.yaml`` and ``environment.json``."""
        write_atomically(directory.config, config.dump(self))
        environment = describe_environment(device, config.redact_arguments(command))
        write_atomically(directory.environment, json.dumps(environment, indent=1) + "\n")

    # --- assembling ---------------------------------------------------------------------------------------------

    def assemble(self, device: torch.device) -> Parts:
        """Build everything that training needs, on ``device``; writes nothing but the data cache."""
        precision = self.precision.build(device)
        tokenizer = self.tokenizer.build()
        vocab_size = self.vocab_size(tokenizer)
        corpus = self.data.build(tokenizer)
        generator = torch.Generator(device).manual_seed(self.runtime.seed)
        model = self.model.create(vocab_size, device, generator)
        self.lora.apply(model)
        with config.naming("optimizer"):
            optimizer = self.optimizer.build(model)
        with config.naming("clipping"):
            self.clipping.check_parameters([name for name, p in model.named_parameters() if p.requires_grad])
        loss_sum: Callable[[Tensor, Tensor], Tensor] = partial(self.objective, model)
        if self.runtime.compile:
            loss_sum = compiled(loss_sum, device)
        max_steps = self.loop.total_steps(self.accumulation, len(corpus.train), self.data.sequence_length)
        return Parts(device, tokenizer, corpus, model, loss_sum, optimizer, precision, max_steps)

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

    def check_space(self, parts: Parts) -> None:
        """Refuse a run whose checkpoints cannot fit on the disk."""
        place = Path(self.run_dir or self.output_dir).absolute()
        while not place.exists():
            place = place.parent
        tensors = [*parts.model.state_dict().values(), *state_tensors(parts.optimizer).values()]
        checkpoint = sum(tensor.nbytes for tensor in tensors)
        needed = checkpoint * (max(self.checkpoint.keep_last, 1) + 1)  # one more than is kept, while it is written
        free = shutil.disk_usage(place).free
        if free < needed:
            raise ValueError(
                f"{place}: {size(free)} free, the checkpoints of this run need {size(needed)}; "
                "make room, or name another place: output_dir=DIR"
            )

    # --- running ------------------------------------------------------------------------------------------------

    def execute(
        self,
        parts: Parts,
        directory: RunDirectory,
        state: TrainState,
        *,
        resumed: bool = False,
        changes: Sequence[tuple] = (),
    ) -> Result:
        """Train ``parts`` from ``state`` in ``directory``, and leave its plot and summary."""
        start = state.step
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            stack.enter_context(parts.precision.arithmetic())
            metrics = stack.enter_context(self.metrics.build(directory.path, resume_step=start if resumed else None))
            display = stack.enter_context(open_display(directory.path))
            loader = stack.enter_context(self.open_loader(parts, state))
            peak = peak_flops(parts.device, parts.precision.dtype)
            flops_per_token = parts.model.flops_per_token(self.data.sequence_length)
            display.header(list(self.header(parts, directory, state, peak)))
            display.start(start, parts.max_steps)
            if start or changes:
                row = {"event": "resume", "step": start, "changes": [list(change) for change in changes]}
                metrics.row(row)
                display.event(row)
            loop = Loop(
                config=self.loop, state=state, max_steps=parts.max_steps, device=parts.device,
                tokenizer=parts.tokenizer, corpus=parts.corpus, model=parts.model, loss_sum=parts.loss_sum,
                optimizer=parts.optimizer, schedule=self.schedule, peak_lr=self.optimizer.lr,
                precision=parts.precision, clipping=self.clipping, accumulation=self.accumulation,
                checkpoint=self.checkpoint, seed=self.runtime.seed, loader=loader, directory=directory,
                config_text=directory.config.read_text(encoding="utf-8"), metrics=metrics,
                log_every=self.metrics.log_every, display=display, stop=lambda: bool(stop),
                flops_per_token=flops_per_token, peak_flops=peak,
            )  # fmt: skip
            if resumed:
                remember_looks(loop, directory)
            reason = "failed"
            try:
                reason = loop.run()
                if stop:
                    row = {"event": "stop", "step": state.step, "signal": stop.signal_name}
                    metrics.row(row)
                    display.event(row)
            finally:
                summary = self.summarise(loop, reason)
                write_atomically(directory.summary, json.dumps(summary, indent=1) + "\n")
                if reason != "failed":
                    from llmtrain.report.curves import draw_run  # matplotlib takes a while to import

                    draw_run(directory.path)
                display.summary(summary)
        return Result(directory.path, summary, parts.model)

    def open_loader(self, parts: Parts, state: TrainState) -> Loader:
        """The training batches from ``state`` on."""
        return Loader(
            parts.corpus.train,
            seed=self.runtime.seed,
            shuffle=self.data.shuffle,
            batch_size=self.accumulation.batch_size_at,
            device=parts.device,
            position=state.position,
            step=state.step,
            tokens=state.tokens,
        )

    def header(
        self, parts: Parts, directory: RunDirectory, state: TrainState, peak: float
    ) -> Iterator[tuple[str, str]]:
        """What is trained, on what, how long it will take."""
        model, corpus = parts.model, parts.corpus
        sequence = self.data.sequence_length
        batch = self.accumulation.batch_size_at(state.step, state.tokens)
        micro = min(self.accumulation.micro_batch_size, batch)
        steps_left = parts.max_steps - state.step
        tokens = steps_left * batch * sequence
        flops = tokens * model.flops_per_token(sequence)
        yield "run", str(directory.path)
        yield "model", f"{self.name}, {count(model.num_parameters())} parameters, context {model.context_length}"
        yield "data", corpus.description
        epochs = tokens / max(corpus.train.tokens, 1)
        split = f" in micro-batches of {micro}" if micro < batch else ""
        yield "batch", f"{batch} × {sequence} = {batch * sequence:,} tokens a step{split}"
        yield "length", f"{steps_left:,} steps, {count(tokens)} tokens, {epochs:.2f} epochs, {flops:.2e} FLOPs"
        warmup = self.schedule.warmup(parts.max_steps)
        optimizer, schedule = (type(part).__module__.rpartition(".")[2] for part in (self.optimizer, self.schedule))
        warming = f", {warmup} warm-up steps" if warmup else ""
        yield "optimizer", f"{optimizer}, learning rate {self.optimizer.lr:g}; schedule {schedule}{warming}"
        yield "device", f"{device_name(parts.device)}, {parts.precision.name}, {rate(peak, 'FLOP/s')} at most"
        yield "time", f"at best {duration(flops / (0.6 * peak))}, at 60% of that; an estimate follows with the steps"

    def summarise(self, loop: Loop, reason: str) -> dict[str, Any]:
        """``summary.json``."""
        state = loop.state
        return {
            "exit_reason": reason,
            "name": self.name,
            "step": state.step,
            "max_steps": loop.max_steps,
            "tokens": state.tokens,
            "train_seconds": round(state.train_seconds, 3),
            "tokens_per_second": round(state.tokens / state.train_seconds, 1) if state.train_seconds else None,
            "final_loss": finite(loop.last_loss),
            "final_train_loss": finite(loop.last_train_loss),
            "final_val_loss": finite(loop.last_val_loss),
            "best_val_loss": finite(state.best_val_loss),
            "best_val_step": state.best_val_step,
            "refused_steps": state.refused_steps,
            "parameters": loop.model.num_parameters(),
        }


def remember_looks(loop: Loop, directory: RunDirectory) -> None:
    """Tell a resumed loop what was evaluated and sampled before: a checkpoint is written ahead of either."""
    if directory.metrics.exists():
        for row in read_metrics(directory.metrics):
            if "val_loss" in row:
                loop.note_validation(row)
    if directory.samples.exists():
        loop.sampled_step = max((row["step"] for row in read_metrics(directory.samples)), default=None)


def finite(value: float | None) -> float | None:
    """``value``, or None where there is no number to speak of: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def compiled(function: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """``function`` through ``torch.compile``.  Raises ValueError where there is no compiler for it."""
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        raise ValueError("runtime.compile=true: torch.compile needs a C++ compiler on a CPU (g++); take false")
    if sys.version_info >= (3, 15):
        raise ValueError("runtime.compile=true: torch.compile does not know this Python yet; take false")
    return torch.compile(function, dynamic=False)
