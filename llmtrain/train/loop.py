"""The training loop: the step, and what is done once in a while."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.accumulation import Accumulation
from llmtrain.base.device import peak_memory
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.format import remove_checkpoint
from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.policy import Checkpoint
from llmtrain.checkpoint.restore import newest_whole, restore
from llmtrain.checkpoint.writer import Saved, Saver
from llmtrain.clipping import Clipping
from llmtrain.data import Batch
from llmtrain.data.loader import Loader
from llmtrain.display import Display
from llmtrain.evaluation.loss import LossSum
from llmtrain.metrics import Metrics
from llmtrain.model import LanguageModel
from llmtrain.optimizer import step as optimizer_step
from llmtrain.precision import Precision
from llmtrain.recovery import Action, Failure, RateReduction, Recovery, Rollback, Skip, Verdict
from llmtrain.run.directory import RunDirectory
from llmtrain.schedule import Schedule
from llmtrain.train.config import LoopConfig
from llmtrain.train.evaluation import Looks
from llmtrain.train.out_of_memory import halve_on_out_of_memory
from llmtrain.train.profiler import Profiler
from llmtrain.train.readback import Readback, StepRecord
from llmtrain.train.state import TrainState
from llmtrain.train.step_timer import Stopwatch
from llmtrain.train.worst_sequences import find_worst_sequences

MAX_REFUSED_AT_END = 3  # steps in a row; a run that ends with as many has not come to anything


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message explains.  What was saved before is whole."""


@dataclass
class Loop:
    """One run in one process.  Every field is ready to use; nothing in here knows a concrete option."""

    config: LoopConfig
    state: TrainState
    max_steps: int
    device: torch.device
    model: LanguageModel
    loss_sum: LossSum
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    peak_lr: float
    precision: Precision
    clipping: Clipping
    accumulation: Accumulation
    recovery: Recovery
    examples: int  # offending examples that an event of the recovery shows
    open_loader: Callable[[TrainState], Loader]
    sequences_at: Callable[[int, int], np.ndarray]  # (position, count) -> numbers of the training sequences there
    looks: Looks
    checkpoint: Checkpoint
    saver: Saver
    directory: RunDirectory
    config_text: str  # config.yaml, for the checkpoints
    metrics: Metrics
    log_every: int
    display: Display
    stop: Callable[[], str | None]  # why to stop, once there is a reason
    flops_per_token: int
    peak_flops: float
    can_restore: Callable[[Path], bool]  # whether a checkpoint's optimizer state is of this run's kind of optimizer
    name_target: Callable[[int], str] | None = None  # where targets are classes
    profiler: Profiler = field(default_factory=Profiler)
    clock: Callable[[], float] = time.perf_counter

    last_loss: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.readback = Readback(self.device)
        self.stopwatch = Stopwatch(self.device, self.clock, self.profiler.on_phase_end)
        self.parameters = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.loader = self.open_loader(self.state)
        self.saved_step: int | None = self.state.step or None  # a resumed run starts from what is already saved
        self.refused_in_a_row = 0
        self.tried_step: int | None = None  # the step of the last save, whatever became of it
        self.save_error: Exception | None = None  # of the last save, if it failed
        self.save_cost = 0.0  # seconds that the last save took
        self.trained_at_save = self.state.train_seconds
        self.started = self.mark = self.saved_at = self.clock()  # mark: training is accounted for up to here
        self.since_log = [0, 0, 0.0]  # steps, tokens, seconds since the last row

    def close(self) -> None:
        """End the loader, close the samples."""
        self.loader.close()
        self.looks.samples.close()
        self.profiler.close()

    def run(self) -> str:
        """Train to the end, or until there is a reason to stop; returns ``"finished"`` or ``"interrupted"``.

        A checkpoint is written in either case.  Raises :class:`TrainingFailed`.
        """
        self.model.train()
        self.look()
        self.mark = self.saved_at = self.clock()
        while self.state.step < self.max_steps and not self.stop_reason():
            self.advance()
            if self.is_save_due():
                self.save(copied=not self.is_over())
            self.look()
        self.save(copied=False)
        self.settle(wait=True)
        if self.profiler.is_unfinished:
            self.write_profile()
        if self.saved_step != self.state.step:
            raise TrainingFailed(
                f"step {self.state.step}: the checkpoint could not be written: {self.save_error}; "
                f"{self.older_checkpoints()}; make room, then go on with: llmtrain resume {self.directory.path}"
            ) from self.save_error
        if self.state.step < self.max_steps or self.is_look_due():
            return "interrupted"
        if self.refused_in_a_row >= MAX_REFUSED_AT_END:
            raise TrainingFailed(
                f"the run is through, but none of its last {self.refused_in_a_row} steps reached the weights (see the "
                f"events in {self.directory.metrics}). Usual remedies: a lower optimizer.lr, a longer "
                f"schedule.warmup_steps, clipping=norm, precision=fp32; to train on: llmtrain resume "
                f"{self.directory.path} loop.max_steps=N"
            )
        return "finished"

    def stop_reason(self) -> str | None:
        """Why to save and leave now: a signal, or the end of ``loop.max_minutes``."""
        if reason := self.stop():
            return reason
        limit = self.config.max_minutes
        if limit is not None and self.clock() - self.started >= 60 * limit:
            return f"loop.max_minutes={limit:g}"
        return None

    def is_over(self) -> bool:
        """Whether there will be no further step here."""
        return self.state.step == self.max_steps or self.stop_reason() is not None

    # --- the step ---------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One optimizer step, and what follows from the numbers of earlier ones."""
        self.train_step()
        self.settle(wait=False)
        self.handle(self.readback.ready())
        self.act(self.recovery.decide(self.state.step))
        if self.profiler.step():
            self.write_profile()

    def train_step(self) -> None:
        """One optimizer step.  The host only launches work here; it never waits for the device."""
        state = self.state
        learning_rate = self.schedule(state.step, peak=self.peak_lr, total=self.max_steps)
        learning_rate *= self.recovery.rate_factor(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]
        self.stopwatch.start()
        batch = self.loader.next()
        self.stopwatch.mark("data")
        loss = halve_on_out_of_memory(
            lambda size: self.accumulate(batch, size), self.micro_batch_size(len(batch.inputs)), self.note_halved
        )
        self.precision.unscale([p for _, p in self.parameters])
        gradient = self.clipping(self.parameters, state.step)
        verdict = self.recovery.judge(loss, gradient.norm)
        self.stopwatch.mark("optimizer")
        self.saver.before_update()
        self.stopwatch.mark("other")  # waiting for the copy of a checkpoint
        optimizer_step(self.optimizer, verdict["refused"])
        self.optimizer.zero_grad(set_to_none=True)
        self.stopwatch.mark("optimizer")
        self.stopwatch.finish()

        scalars = {
            "loss": loss,
            "grad_norm": gradient.norm,
            "grad_max": gradient.largest,
            "clipped": gradient.clipped,
            **verdict,
        }
        if self.precision.scaler is not None:
            scalars["loss_scale"] = self.precision.scaler.scale
            self.precision.scaler.update(verdict["non_finite"])
        record = StepRecord(
            state.step + 1, state.position, batch.num_tokens, state.tokens + batch.num_tokens, len(batch.inputs),
            learning_rate,
        )  # fmt: skip
        state.step += 1
        state.position += len(batch.inputs)
        state.tokens += batch.num_tokens
        self.readback.push(record, scalars)
        self.display.step(state.step)

    def accumulate(self, batch: Batch, micro_batch_size: int) -> Tensor:
        """Forward and backward of every micro-batch; returns the step's loss.

        Each micro-batch adds (its sum of token losses) / (valid targets of the whole step), so any split of the
        batch gives the gradient of the whole.
        """
        loss = torch.zeros((), device=self.device)
        for inputs, targets, segments in batch.split(micro_batch_size):
            with self.precision.autocast():
                part = self.loss_sum(inputs, targets, segments) / max(batch.num_targets, 1)
            self.stopwatch.mark("forward")
            self.precision.scale(part).backward()
            self.stopwatch.mark("backward")
            loss = loss + part.detach()
        return loss

    def micro_batch_size(self, batch_size: int) -> int:
        """Sequences of a forward pass: the config's, or what has been found to fit."""
        return min(self.state.micro_batch_size or self.accumulation.micro_batch_size, batch_size)

    def note_halved(self, size: int, message: str) -> None:
        """The step is done again, on the same data, in smaller micro-batches, and so are all that follow."""
        self.optimizer.zero_grad(set_to_none=True)
        self.stopwatch.mark("other")
        self.state.micro_batch_size = size
        self.event("out_of_memory", self.state.step + 1, micro_batch_size=size, message=message)

    # --- what has come back -----------------------------------------------------------------------------------------

    def handle(self, records: list[StepRecord]) -> None:
        """Account for steps whose numbers have come back: log them, and tell the recovery."""
        for record in records:
            self.stopwatch.read()
            self.since_log[0] += 1
            self.since_log[1] += record.tokens
            verdict = Verdict.of(record.step, record.position, record.batch_size, record.values)
            self.recovery.record(verdict)
            self.refused_in_a_row = self.refused_in_a_row + 1 if verdict.refused else 0
            if verdict.refused:
                self.state.refused_steps += 1
                self.report_refusal(record, verdict)
            self.last_loss = record.values["loss"]
            if record.step == 1 or record.step % self.log_every == 0 or record.step == self.max_steps:
                self.log(record)

    def log(self, record: StepRecord) -> None:
        """Write the metrics row of a step; speeds are means since the last row."""
        self.account()
        steps, tokens, seconds = self.since_log
        self.since_log = [0, 0, 0.0]
        rate = tokens / max(seconds, 1e-9)
        row = {
            "step": record.step,
            "tokens": record.total_tokens,
            "epoch": self.looks.epoch(record.total_tokens),
            "loss": record.values["loss"],
            "learning_rate": record.learning_rate,
            "grad_norm": record.values["grad_norm"],
            "grad_max": record.values["grad_max"],
            "clipped": bool(record.values["clipped"]),
            "refused": bool(record.values["refused"]),
            "batch_size": record.batch_size,
            "tokens_per_second": round(rate, 1),
            "mfu": round(rate * self.flops_per_token / self.peak_flops, 4),
            "step_seconds": round(seconds / max(steps, 1), 6),
            **{
                f"{phase}_seconds": round(value / max(steps, 1), 6)
                for phase, value in self.stopwatch.take(seconds).items()
            },
            "memory_bytes": peak_memory(self.device),
        }
        if "loss_scale" in record.values:
            row["loss_scale"] = record.values["loss_scale"]
        self.metrics.row(row)
        self.display.row(row)

    def account(self) -> None:
        """Book the time since the mark as training time."""
        now = self.clock()
        self.state.train_seconds += now - self.mark
        self.since_log[2] += now - self.mark
        self.mark = now

    def event(self, name: str, step: int, **details: Any) -> None:
        """Record something out of the ordinary, in the metrics and before the user."""
        row = {"event": name, "step": step, **details}
        self.metrics.row(row)
        self.display.event(row)

    def write_profile(self) -> None:
        """Have the profile of some steps written and say where it is; the time that takes is not training's."""
        self.handle(self.readback.drain())
        self.account()
        profile = self.profiler.write()
        path = None if profile.path is None else str(profile.path.relative_to(self.directory.path))
        self.event("profile", self.state.step, path=path, message=profile.message)
        self.mark = self.clock()

    # --- recovery ---------------------------------------------------------------------------------------------------

    def act(self, actions: Sequence[Action]) -> None:
        """Carry out what the recovery has decided."""
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Skip):
                self.skip(action.batches)
                message = f"{action.batches} batches of data are left out; on from position {self.state.position:,}"
                where = {"batches": action.batches, "position": self.state.position}
                self.event("skip", self.state.step, message=message, **where)
            elif isinstance(action, Rollback):
                queue.extend(self.roll_back(action))
            elif isinstance(action, RateReduction):
                message = f"the learning rate is multiplied by {action.factor:g} for {action.steps:,} steps"
                self.event("lower_rate", self.state.step, message=message, factor=action.factor, steps=action.steps)
            elif isinstance(action, Failure):
                raise TrainingFailed(
                    f"{action.reason} Resumed as it is, the run would come to the same end; go on from its last "
                    f"checkpoint with a change: llmtrain resume {self.directory.path} KEY=VALUE"
                )

    def report_refusal(self, record: StepRecord, verdict: Verdict) -> None:
        """Say which step never reached the weights, why, and on which text."""
        examples = []
        if self.examples and not verdict.scaler_overflow:
            with self.precision.autocast():
                examples = find_worst_sequences(
                    self.looks.plain_loss_sum, self.model, self.looks.tokenizer, self.looks.corpus.train,
                    self.sequences_at(record.position, record.batch_size), self.examples, self.device,
                    self.name_target,
                )  # fmt: skip
        values = {key: record.values[key] for key in ("loss", "grad_norm")}
        self.event("refused", record.step, position=record.position, **values, reason=verdict.reason, examples=examples)

    def skip(self, batches: int) -> None:
        """Leave out the data of so many steps."""
        state = self.state
        sequences = batches * self.accumulation.batch_size_at(state.step, state.tokens)
        state.position += sequences
        state.skipped_sequences += sequences
        self.loader.close()
        self.loader = self.open_loader(state)

    def roll_back(self, action: Rollback) -> Sequence[Action]:
        """Go back to a checkpoint before the trouble, but on with the data behind it.

        Returns what the recovery wants next, where there is no such checkpoint.
        """
        self.handle(self.readback.drain())
        self.account()
        self.settle(wait=True)
        checkpoints = [path for path in self.directory.find_checkpoints() if self.can_restore(path)]
        path, damaged = newest_whole(checkpoints, at_most=action.before_step, known=self.saver.whole)
        for error in damaged:
            self.event("damaged", self.state.step, message=str(error))
        if path is None:
            return self.recovery.rolled_back(None, None)
        now = self.state
        self.state = state = restore(path, self.model, self.optimizer)
        assert state.step <= action.before_step
        state.restore_rng(self.device)
        self.precision.load_state_dict(state.scaler)
        for kept in ("position", "skipped_sequences", "refused_steps", "train_seconds", "micro_batch_size"):
            setattr(state, kept, getattr(now, kept))
        self.forget_after(state.step)
        self.skip(action.batches)
        more = self.recovery.rolled_back(state.step, state.recovery)
        where = {"to_step": state.step, "batches": action.batches, "position": state.position}
        message = f"to the checkpoint of step {state.step:,}, and on with later data, from position {state.position:,}"
        self.event("roll_back", now.step, message=message, **where)
        # The checkpoint of this step gets the new position before anything else can go wrong.
        for later in sorted((path for path in checkpoints if step_of(path) > state.step), reverse=True):
            remove_checkpoint(later)
            self.saver.whole.discard(later)
        self.saved_step = self.tried_step = None
        self.save(copied=False)
        self.settle(wait=True)
        return more

    def forget_after(self, step: int) -> None:
        """Drop what was logged, sampled and evaluated after ``step``: it will be again, and differently."""
        self.metrics.rewind(step)
        self.looks.forget_after(self.state)
        self.since_log = [0, 0, 0.0]
        self.stopwatch.forget()
        self.display.start(step, self.max_steps)

    # --- saving -----------------------------------------------------------------------------------------------------

    def is_save_due(self) -> bool:
        """Whether to save after this step."""
        return self.is_over() or self.checkpoint.is_due(self.state.step, self.clock() - self.saved_at)

    def save(self, *, copied: bool = True) -> None:
        """Begin to write a checkpoint of this moment, unless there is one; an earlier one comes to its end first.

        ``copied``: training goes on beside it.
        """
        self.handle(self.readback.drain())
        self.account()
        self.settle(wait=True)
        if self.state.step not in (self.saved_step, self.tried_step):
            self.capture_state()
            model, optimizer = saved_tensors(self.model), state_tensors(self.optimizer)
            state, standings = self.state.to_json(), self.looks.standings
            self.saver.begin(model, optimizer, state, self.config_text, standings, copied=copied)
            self.saved_step = self.tried_step = self.state.step
            self.trained_at_save = self.state.train_seconds
        self.mark = self.saved_at = self.clock()

    def capture_state(self) -> None:
        """Bring ``state`` up to this moment, with what others keep of it."""
        self.handle(self.readback.drain())
        self.state.capture_rng(self.device)
        self.state.scaler = self.precision.state_dict()
        self.state.recovery = self.recovery.state_dict()

    def settle(self, *, wait: bool) -> None:
        """Take note of what has become of the save under way, if it is through or is to be waited for."""
        saved = self.saver.collect(wait=wait)
        if saved is None:
            return
        for message in saved.damaged:
            self.event("damaged", saved.step, message=message)
        self.save_error, self.save_cost = saved.error, saved.seconds
        if saved.error is None:
            path = str(saved.path.relative_to(self.directory.path))
            seconds, held = round(saved.seconds, 3), round(saved.held_seconds, 3)
            self.event("save", saved.step, path=path, seconds=seconds, held_seconds=held, removed=saved.removed)
        else:
            self.note_failed_save(saved, saved.error)

    def note_failed_save(self, saved: Saved, error: Exception) -> None:
        """A full disk must not end a run: the older checkpoints are whole, and there is a next time."""
        if not isinstance(error, OSError | CheckpointError):
            raise TrainingFailed(
                f"step {saved.step}: saving failed: {type(error).__name__}: {error}. Older checkpoints are untouched"
            ) from error
        if self.saved_step == saved.step:
            self.saved_step = None
        message = f"{error}; {self.older_checkpoints()}, the run goes on and tries again at its next save"
        self.event("save_failed", saved.step, message=message)

    def older_checkpoints(self) -> str:
        """What there is to go on from, in words."""
        newest = max(map(step_of, self.directory.find_checkpoints()), default=None)
        return "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is whole"

    # --- looking ----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Evaluate and sample where it is time to; after a save where that is worth it, so that neither loses much."""
        if not self.is_look_due() or self.stop_reason():
            return
        self.handle(self.readback.drain())
        self.account()
        trained = self.state.train_seconds - self.trained_at_save
        if self.state.step > 0 and self.checkpoint.is_due_ahead(trained, self.save_cost):
            self.save(copied=False)
            self.settle(wait=True)
        size = self.micro_batch_size(self.accumulation.micro_batch_size)
        at_end = self.state.step == self.max_steps
        self.looks.look(self.state, at_end=at_end, micro_batch_size=size, stop=self.stop_reason)
        self.mark = self.clock()

    def is_look_due(self) -> bool:
        """Whether to evaluate or sample after this step, and it has not been done yet."""
        step, at_end = self.state.step, self.state.step == self.max_steps
        return self.looks.evaluates(step, at_end=at_end) or self.looks.samples_at(step, at_end=at_end)
