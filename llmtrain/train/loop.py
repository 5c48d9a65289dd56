"""The training loop: the step, and the work between steps."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from llmtrain.base.format import counted
from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.format import remove_checkpoint
from llmtrain.checkpoint.model_state import stored_places
from llmtrain.checkpoint.writer import Saver
from llmtrain.clipping import Clipping
from llmtrain.data import Batch
from llmtrain.data.loader import Loader, TrainingStream
from llmtrain.recovery import Action, Failure, RateReduction, Recovery, Rollback, Skip, Verdict
from llmtrain.train.agreement import Agreement
from llmtrain.train.config import LoopConfig
from llmtrain.train.evaluation import Evaluator
from llmtrain.train.failure import TrainingFailed
from llmtrain.train.length import TrainingLength
from llmtrain.train.log import RunLog
from llmtrain.train.readback import Readback, StepRecord
from llmtrain.train.saves import Saves
from llmtrain.train.state import TrainState, restore_state
from llmtrain.train.step import Step, seed_step

MAX_SKIPPED_AT_END = 3  # steps in a row; a run that ends with as many has failed
KEPT_AT_ROLL_BACK = ("position", "skipped_sequences", "refused_steps", "train_seconds", "micro_batch_size")


class Loop:
    """One run, as one of its ranks sees it.  Every argument is ready to use; the loop knows no concrete option.

    Args:
        learning_rate: gives that of a step, by its 0-based number, before the recovery changes it.
        stop: gives the reason to stop, once there is one.
    """

    def __init__(
        self,
        config: LoopConfig,
        state: TrainState,
        length: TrainingLength,
        step: Step,
        stream: TrainingStream,
        learning_rate: Callable[[int], float],
        clipping: Clipping,
        recovery: Recovery,
        evaluator: Evaluator,
        saver: Saver,
        log: RunLog,
        stop: Callable[[], str | None],
    ) -> None:
        self.config = config
        self.state = state
        self.length, self.max_steps = length, length.max_steps
        self.step = step
        self.stream = stream
        self.learning_rate = learning_rate
        self.clipping = clipping
        self.recovery = recovery
        self.evaluator = evaluator
        self.saver = saver
        self.log = log
        self.stop = stop

        step.on_halved = self._record_halving
        self.world = step.parallel.world
        self.agreement = Agreement(self.world, log.device, self._own_reason)
        self.readback = Readback(log.device, is_early=self.world.size == 1)
        self.loader = self._open_loader()
        self.last_loss: float | None = None
        self.skipped_in_a_row = 0
        self.saves = Saves(saver, step, log, state)
        self.started = log.clock()
        log.restart()

    def close(self) -> None:
        """Close the loader, the profiler and the file of samples."""
        self.loader.close()
        self.evaluator.close()
        self.log.timer.profiler.close()

    def run(self) -> str:
        """Train to the end, or until there is a reason to stop; returns ``"finished"`` or ``"interrupted"``.

        A checkpoint is written in either case.  Raises :class:`TrainingFailed`.
        """
        self.step.unit.train()
        self.evaluate()
        self.saves.restart_clock()
        self.log.restart()
        while self.state.step < self.max_steps and not self.stop_reason():
            self.advance()
            if self._is_save_due():
                self.save(copied=not self._is_over())
            self.evaluate()
        self.save(copied=False)
        self.saves.collect(wait=True)
        if self.log.timer.profiler.is_unfinished:
            self._write_profile()
        self.saves.check(self.state.step)
        if self.state.step < self.max_steps or self._is_evaluation_due():
            return "interrupted"
        if self.skipped_in_a_row >= MAX_SKIPPED_AT_END:
            raise TrainingFailed(
                f"the run reached its end, but none of its last {self.skipped_in_a_row} steps updated the weights (see "
                f"the events in its metrics.jsonl). Usual remedies: a lower optimizer.lr, a longer "
                f"schedule.warmup_steps, clipping=norm, precision=fp32; to train on: llmtrain resume "
                f"{self.log.run_dir} loop.max_steps=N"
            )
        return "finished"

    def stop_reason(self) -> str | None:
        """The reason to save and stop now, on which all ranks agree."""
        return self.agreement.reason()

    def _own_reason(self) -> str | None:
        """The reason of this process: a signal, or the end of ``loop.max_minutes``."""
        if reason := self.stop():
            return reason
        limit = self.config.max_minutes
        if limit is not None and self.log.clock() - self.started >= 60 * limit:
            return f"loop.max_minutes={limit:g}"
        return None

    def _is_over(self) -> bool:
        return self.state.step == self.max_steps or self.stop_reason() is not None

    # --- the step ---------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Do one optimizer step, and account for the steps whose numbers have arrived."""
        self.train_step()
        self.saves.collect(wait=False)
        self.account_for(self.readback.ready())
        self._act(self.recovery.decide(self.state.step))
        if self.log.timer.profiler.step():
            self._write_profile()

    def train_step(self) -> None:
        """Do one optimizer step.  The host only launches work here; it never waits for the device."""
        state, timer = self.state, self.log.timer
        learning_rate = self.learning_rate(state.step) * self.recovery.rate_factor(state.step)
        timer.start()
        self.world.mark("data", state.step)
        batch = self.loader.next()
        timer.mark("data")
        self.world.mark("compute", state.step)
        sequences = self.length.batch_size_at(state.step, state.tokens)  # of all ranks
        is_smaller = self.length.missing_at(state.step) > 0  # not compiled for one step
        if self.world.size > 1:
            seed_step(self.stream.seed, state.step, self.step.parallel.seed_rank)
        with self.step.unit.eager() if is_smaller else nullcontext():
            loss = self.step.gradients(batch, self.agreement.flags(self.saves.is_due_by_clock))
        clip = self.step.clip(self.clipping, state.step, largest=self._is_logged(state.step + 1))
        judged = self.recovery.judge(loss.total, clip.norm)
        timer.mark("optimizer")
        self.world.mark("update", state.step)
        self.saver.before_update()
        timer.mark("other")  # waiting for the copy of a checkpoint
        self.step.update(learning_rate, judged["refused"], clip.divisor)
        exchanged = self.step.parallel.after_update(state.step + 1, is_last=state.step + 1 == self.max_steps)
        timer.mark("optimizer")
        timer.finish()

        scalars = {"loss": loss.total, "grad_norm": clip.norm, "clipped": clip.clipped}
        scalars |= {} if clip.largest is None else {"grad_max": clip.largest}
        losses = tuple(loss.parts) if len(loss.parts) > 1 else ()
        scalars |= {f"{name}_loss": loss.parts[name] for name in losses} | judged | exchanged
        scalars |= self.agreement.scalars(loss.flags)
        if (scaler := self.step.precision.scaler) is not None:
            scalars["loss_scale"] = scaler.scale
            scaler.update(judged["non_finite"])
        self.readback.push(self._record(batch, sequences, learning_rate, losses), scalars)
        state.short_sequences += self.length.missing_at(state.step)
        state.step += 1
        state.position += sequences
        state.tokens += batch.tokens
        self.log.display.step(state.step)

    def _record(self, batch: Batch, sequences: int, learning_rate: float, losses: tuple[str, ...]) -> StepRecord:
        state = self.state
        return StepRecord(
            state.step + 1, state.position, batch.tokens, state.tokens + batch.tokens, sequences, learning_rate,
            self.log.flops_of(batch.spans), losses,
        )  # fmt: skip

    def _record_halving(self, size: int, message: str) -> None:
        self.state.micro_batch_size = size
        self.log.event("out_of_memory", self.state.step + 1, micro_batch_size=size, message=message)

    def _open_loader(self) -> Loader:
        return self.stream.open(position=self.state.position, step=self.state.step, tokens=self.state.tokens)

    # --- the numbers of earlier steps -------------------------------------------------------------------------------

    def account_for(self, records: list[StepRecord]) -> None:
        """Log the steps whose numbers have arrived, and give them to the recovery."""
        for record in records:
            self.agreement.record(record.values)
            self.log.count(record)
            verdict = Verdict.of(record.step, record.position, record.batch_size, record.values)
            self.recovery.record(verdict)
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if verdict.refused else 0
            if verdict.refused:
                self.state.refused_steps += 1
                self._report_skipped(record, verdict)
            self.last_loss = record.values["loss"]
            if self._is_logged(record.step):
                self._account_time()
                self.log.step_row(record)

    def _is_logged(self, step: int) -> bool:
        """Return whether the metrics have a row of ``step`` (1-based)."""
        return step == 1 or step % self.log.log_every == 0 or step == self.max_steps

    def _account_time(self) -> None:
        self.state.train_seconds += self.log.account()

    def _drain(self) -> None:
        """Wait for the numbers of all steps, account for them, and count the time so far as training."""
        self.account_for(self.readback.drain())
        self._account_time()

    def _write_profile(self) -> None:
        self._drain()
        self.log.write_profile(self.state.step)

    def _report_skipped(self, record: StepRecord, verdict: Verdict) -> None:
        """Report a skipped step with the reason and its worst sequences."""
        worst = []
        if not verdict.scaler_overflow:
            size = self.step.micro_batch_size
            worst = self.evaluator.worst_sequences(self.stream, record.position, record.batch_size, size)
        values = {key: record.values[key] for key in ("loss", "grad_norm")}
        self.log.event(
            "refused", record.step, position=record.position, **values, reason=verdict.reason, examples=worst
        )

    # --- recovery ---------------------------------------------------------------------------------------------------

    def _act(self, actions: Sequence[Action]) -> None:
        """Carry out what the recovery has decided."""
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Skip):
                self._skip(action.batches)
                message = f"{action.batches} batches of data are left out; next is position {self.state.position:,}"
                where = {"batches": action.batches, "position": self.state.position}
                self.log.event("skip", self.state.step, message=message, **where)
            elif isinstance(action, Rollback):
                queue.extend(self._roll_back(action))
            elif isinstance(action, RateReduction):
                steps = counted(action.steps, "step")
                message = f"the learning rate is multiplied by {action.factor:g} for {steps}"
                self.log.event("lower_rate", self.state.step, message=message, factor=action.factor, steps=action.steps)
            elif isinstance(action, Failure):
                raise TrainingFailed(
                    f"{action.reason} Resumed as it is, the run would fail again; continue from its last "
                    f"checkpoint with a change: llmtrain resume {self.log.run_dir} KEY=VALUE"
                )

    def _skip(self, batches: int) -> None:
        """Leave out the data of so many steps."""
        state = self.state
        sequences = batches * self.stream.batch_size_at(state.step, state.tokens)
        state.position += sequences
        state.skipped_sequences += sequences
        self.loader.close()
        self.loader = self._open_loader()

    def _roll_back(self, action: Rollback) -> Sequence[Action]:
        """Restore a checkpoint from before the trouble, and continue with the data after it.

        Returns the next actions of the recovery, also where there is no such checkpoint.
        """
        self._drain()
        self.saves.collect(wait=True)
        path, damaged = self.saver.newest_to_roll_back_to(at_most=action.before_step)
        for error in damaged:
            self.log.event("damaged", self.state.step, message=str(error))
        if path is None:
            return self.recovery.rolled_back(None, None)
        now = self.state
        unit, parallel = self.step.unit, self.step.parallel
        self.state = state = restore_state(
            path, unit, self.step.optimizer, weights=parallel.held(), places=stored_places(unit, parallel.places())
        )
        parallel.use_loaded()
        assert state.step <= action.before_step
        state.restore_rng(self.log.device)
        self.step.precision.load_state_dict(state.scaler)
        for kept in KEPT_AT_ROLL_BACK:
            setattr(state, kept, getattr(now, kept))
        self._forget_after(state.step)
        self._skip(action.batches)
        more = self.recovery.rolled_back(state.step, state.recovery)
        where = {"to_step": state.step, "batches": action.batches, "position": state.position}
        message = f"to the checkpoint of step {state.step:,}, and with later data, from position {state.position:,}"
        self.log.event("roll_back", now.step, message=message, **where)
        # The checkpoint of this step gets the new position before anything else can fail.
        for later in sorted((p for p in self.saver.checkpoints() if step_of(p) > state.step), reverse=True):
            if self.world.is_first:
                remove_checkpoint(later)
            self.saver.intact.discard(later)
        self.saves.forget()
        self.save(copied=False)
        self.saves.collect(wait=True)
        return more

    def _forget_after(self, step: int) -> None:
        """Drop rows, samples and evaluations after ``step``: the steps are done again with other data."""
        self.log.metrics.rewind(step)
        self.evaluator.forget_after(self.state)
        self.log.reset()
        self.log.display.start(step, self.max_steps)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, *, copied: bool = True) -> None:
        """Start to write a checkpoint of this step, unless there is one; wait for an earlier save first.

        ``copied``: training continues meanwhile.
        """
        self.world.mark("save", self.state.step)
        self._drain()
        self.agreement.saves = False
        self.saves.collect(wait=True)
        if self.saves.is_needed(self.state.step):
            self.capture_state()
            self.saves.begin(self.state, self.evaluator.validation_scores, copied=copied)
        self.saves.restart_clock()
        self.log.restart()

    def capture_state(self) -> None:
        """Update ``state`` with the state of the scaler, the recovery and the random number generators."""
        self.account_for(self.readback.drain())
        self.state.capture_rng(self.log.device)
        self.state.scaler = self.step.precision.state_dict()
        self.state.recovery = self.recovery.state_dict()

    def _is_save_due(self) -> bool:
        if self.world.size == 1:
            return self._is_over() or self.saves.is_due(self.state.step)
        return self._is_over() or self.saves.is_due(self.state.step, by_clock=self.agreement.saves)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate and sample if due.  A checkpoint is written first where much training could be lost."""
        if not self._is_evaluation_due() or self.stop_reason():
            return
        self.world.mark("evaluate", self.state.step)
        self._drain()
        if self.state.step > 0 and self.world.share(self.saves.is_due_ahead(self.state)):
            self.save(copied=False)
            self.saves.collect(wait=True)
        at_end = self.state.step == self.max_steps
        self.evaluator.run(
            self.state, at_end=at_end, micro_batch_size=self.step.micro_batch_size,
            stop=self.agreement.reason_at_once,
        )  # fmt: skip
        self.log.restart()

    def _is_evaluation_due(self) -> bool:
        """Return whether an evaluation or a sample is due after this step and has not been done."""
        step, at_end = self.state.step, self.state.step == self.max_steps
        return self.evaluator.evaluates(step, at_end=at_end) or self.evaluator.samples(step, at_end=at_end)
