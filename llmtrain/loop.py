"""The training loop: the step, and what is done once in a while."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.accumulation import Accumulation
from llmtrain.checkpoint import Checkpoint
from llmtrain.clipping import Clipping
from llmtrain.data import Batch, Corpus
from llmtrain.data.loader import Loader
from llmtrain.data.sequences import Sequences
from llmtrain.display import Display
from llmtrain.evaluate import evaluate
from llmtrain.inference import Sampling, generate
from llmtrain.metrics import Metrics
from llmtrain.model import LanguageModel
from llmtrain.optimizer import step as optimizer_step
from llmtrain.precision import Precision
from llmtrain.readback import Readback, StepRecord
from llmtrain.run_directory import RunDirectory
from llmtrain.runtime import peak_memory
from llmtrain.schedule import Schedule
from llmtrain.state import TrainState
from llmtrain.tokenizer import Tokenizer

MAX_REFUSED_IN_A_ROW = 3


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message explains.  What was saved before is whole."""


@dataclass(frozen=True)
class LoopConfig:
    """The ``loop`` group."""

    max_steps: int | None
    epochs: float | None
    eval_every: int
    eval_batches: int | None
    eval_train_batches: int
    sample_every: int
    sample_prompt: str
    sample_tokens: int
    sample_temperature: float
    sample_top_k: int

    def __post_init__(self) -> None:
        if self.max_steps is None and self.epochs is None:
            raise ValueError("max_steps=null and epochs=null: give one of them")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: must be at least 1")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs}: must be above 0")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ValueError(f"eval_batches={self.eval_batches}: must be at least 1, or null for the whole split")
        for key in ("eval_every", "eval_train_batches", "sample_every", "sample_tokens"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be 0 (never) or more")
        try:
            self.sampling()
        except ValueError as error:
            raise ValueError(f"sample_{error}") from None

    def sampling(self) -> Sampling:
        """How samples are drawn."""
        return Sampling(self.sample_temperature, self.sample_top_k, 1.0)

    def total_steps(self, accumulation: Accumulation, sequences: int, sequence_length: int) -> int:
        """Optimizer steps of the run: ``max_steps``, or fewer where ``epochs`` passes over ``sequences`` end first."""
        if self.epochs is None:
            assert self.max_steps is not None
            return self.max_steps
        target, position, steps = math.ceil(self.epochs * sequences), 0, 0
        while position < target and (self.max_steps is None or steps < self.max_steps):
            position += accumulation.batch_size_at(steps, position * sequence_length)
            steps += 1
        return steps


@dataclass
class Loop:
    """One run in one process.  Every field is ready to use; nothing in here knows a concrete option."""

    config: LoopConfig
    state: TrainState
    max_steps: int
    device: torch.device
    tokenizer: Tokenizer
    corpus: Corpus
    model: LanguageModel
    loss_sum: Callable[[Tensor, Tensor], Tensor]  # (inputs, targets) -> sum of the token losses
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    peak_lr: float
    precision: Precision
    clipping: Clipping
    accumulation: Accumulation
    checkpoint: Checkpoint
    seed: int
    loader: Loader
    directory: RunDirectory
    config_text: str  # config.yaml, for the checkpoints
    metrics: Metrics
    log_every: int
    display: Display
    stop: Callable[[], bool]
    flops_per_token: int
    peak_flops: float
    clock: Callable[[], float] = time.perf_counter

    last_loss: float | None = field(default=None, init=False)
    last_val_loss: float | None = field(default=None, init=False)
    last_train_loss: float | None = field(default=None, init=False)  # evaluated as the validation loss is

    def __post_init__(self) -> None:
        self.readback = Readback(self.device)
        self.parameters = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.saved_step: int | None = None
        self.evaluated_step: int | None = None
        self.sampled_step: int | None = None
        self.mark = self.clock()  # since when the running stretch of training has not been accounted for
        self.since_log = [0, 0, 0.0]  # steps, tokens, seconds since the last row

    def run(self) -> str:
        """Train to the end, or until asked to stop; returns ``"finished"`` or ``"interrupted"``.

        A checkpoint is written in either case.  Raises :class:`TrainingFailed`.
        """
        self.saved_step = self.state.step or None  # a resumed run starts from what is already saved
        self.model.train()
        self.look()
        self.mark = self.clock()
        while self.state.step < self.max_steps and not self.stop():
            self.train_step()
            self.handle(self.readback.ready())
            if self.checkpoint.is_due(self.state.step) or self.state.step == self.max_steps or self.stop():
                self.save()
            self.look()
        finished = self.state.step >= self.max_steps
        if self.saved_step != self.state.step:
            self.save()
        return "finished" if finished else "interrupted"

    def train_step(self) -> None:
        """One optimizer step.  The host only launches work here; it never waits for the device."""
        state = self.state
        learning_rate = self.schedule(state.step, peak=self.peak_lr, total=self.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]
        batch = self.loader.next()
        loss = self.accumulate(batch)
        self.precision.unscale([p for _, p in self.parameters])
        gradient = self.clipping(self.parameters, state.step)
        found_inf = (~(loss.isfinite() & gradient.norm.isfinite())).float()
        optimizer_step(self.optimizer, found_inf)
        self.optimizer.zero_grad(set_to_none=True)

        scalars = {
            "loss": loss,
            "grad_norm": gradient.norm,
            "grad_max": gradient.largest,
            "clipped": gradient.clipped,
            "refused": found_inf,
        }
        if self.precision.scaler is not None:
            scalars["loss_scale"] = self.precision.scaler.scale
            self.precision.scaler.update(found_inf)
        state.step += 1
        state.position += len(batch.inputs)
        state.tokens += batch.num_targets
        record = StepRecord(state.step, batch.num_targets, state.tokens, len(batch.inputs), learning_rate)
        self.readback.push(record, scalars)
        self.display.step(state.step)

    def accumulate(self, batch: Batch) -> Tensor:
        """Forward and backward of every micro-batch; returns the step's loss.

        Each micro-batch adds (its sum of token losses) / (valid targets of the whole step), so any split of the
        batch gives the gradient of the whole.
        """
        size = self.accumulation.micro_batch_size
        loss = torch.zeros((), device=self.device)
        for inputs, targets in zip(batch.inputs.split(size), batch.targets.split(size), strict=True):
            with self.precision.autocast():
                part = self.loss_sum(inputs, targets) / max(batch.num_targets, 1)
            self.precision.scale(part).backward()
            loss = loss + part.detach()
        return loss

    def handle(self, records: list[StepRecord]) -> None:
        """Account for steps whose numbers have come back: log them, count refusals, give up after too many."""
        for record in records:
            values = record.values
            self.since_log[0] += 1
            self.since_log[1] += record.tokens
            if values["refused"]:
                self.refuse(record)
            else:
                self.state.refused_in_a_row = 0
            self.last_loss = values["loss"]
            if record.step == 1 or record.step % self.log_every == 0 or record.step == self.max_steps:
                self.log(record)

    def refuse(self, record: StepRecord) -> None:
        """Count a step that never reached the weights."""
        values, state = record.values, self.state
        state.refused_steps += 1
        # With loss scaling an overflow only means that the scale is still too large.
        harmless = math.isfinite(values["loss"]) and values.get("loss_scale", 0.0) > 1.0
        state.refused_in_a_row = 0 if harmless else state.refused_in_a_row + 1
        row = {"event": "refused", "step": record.step, "loss": values["loss"], "grad_norm": values["grad_norm"]}
        self.metrics.row(row)
        self.display.event(row)
        if state.refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise TrainingFailed(
                f"step {record.step}: loss {values['loss']:g} and gradient norm {values['grad_norm']:g}, the "
                f"{MAX_REFUSED_IN_A_ROW}rd step in a row that is not finite. None of them reached the weights. "
                f"Usual remedies: a lower optimizer.lr, a longer schedule.warmup_steps, clipping=norm, "
                f"precision=fp32; go on from the last checkpoint with: llmtrain resume {self.directory.path}"
            )

    def log(self, record: StepRecord) -> None:
        """Write the metrics row of a step; speeds are means since the last row."""
        self.account()
        steps, tokens, seconds = self.since_log
        self.since_log = [0, 0, 0.0]
        rate = tokens / max(seconds, 1e-9)
        row = {
            "step": record.step,
            "tokens": record.total_tokens,
            "epoch": self.epoch(record.total_tokens),
            "loss": record.values["loss"],
            "learning_rate": record.learning_rate,
            "grad_norm": record.values["grad_norm"],
            "grad_max": record.values["grad_max"],
            "clipped": bool(record.values["clipped"]),
            "batch_size": record.batch_size,
            "tokens_per_second": round(rate, 1),
            "mfu": round(rate * self.flops_per_token / self.peak_flops, 4),
            "step_seconds": round(seconds / max(steps, 1), 5),
            "memory_bytes": peak_memory(self.device),
        }
        if "loss_scale" in record.values:
            row["loss_scale"] = record.values["loss_scale"]
        self.metrics.row(row)
        self.display.row(row)

    def epoch(self, tokens: int) -> float:
        """Passes over the training data after ``tokens`` target tokens."""
        return round(tokens / max(self.corpus.train.tokens, 1), 4)

    def account(self) -> None:
        """Book the time since the mark as training time."""
        now = self.clock()
        self.state.train_seconds += now - self.mark
        self.since_log[2] += now - self.mark
        self.mark = now

    def save(self) -> None:
        """Write a checkpoint of this moment.  Raises :class:`TrainingFailed` with the older ones untouched."""
        self.handle(self.readback.drain())
        self.account()
        if self.saved_step != self.state.step:
            self.state.capture_rng(self.device)
            self.state.scaler = self.precision.state_dict()
            try:
                path = self.checkpoint.save(self.directory, self.model, self.optimizer, self.state, self.config_text)
            except OSError as error:
                raise TrainingFailed(
                    f"step {self.state.step}: the checkpoint could not be written: {error}. Older checkpoints are "
                    f"untouched; make room, then go on with: llmtrain resume {self.directory.path}"
                ) from error
            self.saved_step = self.state.step
            row = {"event": "save", "step": self.state.step, "path": str(path.relative_to(self.directory.path))}
            row["seconds"] = round(self.clock() - self.mark, 3)
            self.metrics.row(row)
            self.display.event(row)
        self.mark = self.clock()

    def look(self) -> None:
        """Evaluate and sample where it is time to; after the save, so that neither can lose anything."""
        step, config = self.state.step, self.config
        at_end = step == self.max_steps
        evaluating = self.corpus.validation is not None and config.eval_every > 0
        evaluating = evaluating and (at_end or step % config.eval_every == 0) and step != self.evaluated_step
        sampling = config.sample_every > 0 and step > 0 and (at_end or step % config.sample_every == 0)
        sampling = sampling and step != self.sampled_step
        if not (evaluating or sampling) or self.stop():
            return
        self.handle(self.readback.drain())
        self.account()
        if evaluating:
            self.evaluate()
        if sampling and not self.stop():
            self.sample()
        self.mark = self.clock()

    def evaluate(self) -> None:
        """The validation loss, and that of some training data if asked for, into metrics and state."""
        assert self.corpus.validation is not None
        state = self.state
        loss = self.loss_on(self.corpus.validation, self.config.eval_batches)
        if loss is None:
            return
        row = {"step": state.step, "tokens": state.tokens, "epoch": self.epoch(state.tokens), "val_loss": loss}
        if self.config.eval_train_batches:
            train_loss = self.loss_on(self.corpus.train, self.config.eval_train_batches)
            if train_loss is None:
                return
            row["train_loss"] = train_loss
        self.note_validation(row)
        self.metrics.row(row)
        self.display.validation(row)

    def loss_on(self, sequences: Sequences, batches: int | None) -> float | None:
        """Mean loss over so many batches of the first step's size; None if asked to stop."""
        batch_size = self.accumulation.batch_size_at(0, 0)
        return evaluate(
            self.loss_sum,
            self.model,
            sequences,
            batch_size=min(self.accumulation.micro_batch_size, batch_size),
            max_sequences=None if batches is None else batches * batch_size,
            precision=self.precision,
            device=self.device,
            stop=self.stop,
        )

    def note_validation(self, row: dict[str, Any]) -> None:
        """Take account of a validation row, of this session or of one before."""
        self.evaluated_step = row["step"]
        self.last_val_loss, self.last_train_loss = row["val_loss"], row.get("train_loss")
        if self.state.best_val_loss is None or row["val_loss"] < self.state.best_val_loss:
            self.state.best_val_loss, self.state.best_val_step = row["val_loss"], row["step"]

    def sample(self) -> None:
        """A sample of text, into ``samples.jsonl``.  Training's random numbers are not touched."""
        config, step = self.config, self.state.step
        ids = generate(
            self.model,
            self.tokenizer.encode(config.sample_prompt).tolist(),
            max_tokens=config.sample_tokens,
            sampling=config.sampling(),
            generator=torch.Generator(self.device).manual_seed(self.seed + step),
            dtype=self.precision.dtype,
            end_of_text=self.tokenizer.end_of_text,
        )
        with self.precision.autocast():
            text = self.tokenizer.decode(list(ids))
        self.sampled_step = step
        append_json(self.directory.samples, {"step": step, "prompt": config.sample_prompt, "text": text})
        self.display.sample(step, config.sample_prompt, text)


def append_json(path: Path, row: dict) -> None:
    """Add a line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
