"""The saves of a run: when one is due, its start, and the report of its result."""

from collections.abc import Mapping

from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.writer import RunDirectoryGone, Saver, SaveResult
from llmtrain.metrics import ValidationScore
from llmtrain.train.failure import TrainingFailed
from llmtrain.train.log import RunLog
from llmtrain.train.state import TrainState
from llmtrain.train.step import Step


class Saves:
    """The loop's side of saving: a failed save is reported, and does not end the run.

    ``state``: that of the run's start, for which a resumed run has a checkpoint.
    """

    def __init__(self, saver: Saver, step: Step, log: RunLog, state: TrainState) -> None:
        self.saver = saver
        self.step = step
        self.log = log
        self._saved_step: int | None = state.step or None  # a resumed run starts from a saved step
        self._tried_step: int | None = None  # the step of the last save, failed or not
        self._error: Exception | None = None  # of the last save, if it failed
        self._cost = 0.0  # seconds that the last save took
        self._trained_at_save = state.train_seconds
        self._saved_at = log.clock()

    # --- times ------------------------------------------------------------------------------------------------------

    def restart_clock(self) -> None:
        """Count ``checkpoint.every_minutes`` from now."""
        self._saved_at = self.log.clock()

    def is_due(self, step: int, *, by_clock: bool | None = None) -> bool:
        """Return whether to save after ``step`` steps; ``by_clock``: as ranks have agreed, None: by this one's."""
        by_clock = self.is_due_by_clock() if by_clock is None else by_clock
        return by_clock or self.saver.policy.is_due(step, 0.0)

    def is_due_by_clock(self) -> bool:
        """Return whether the last save is ``checkpoint.every_minutes`` ago."""
        return 0 < 60 * self.saver.policy.every_minutes <= self.log.clock() - self._saved_at

    def is_due_ahead(self, state: TrainState) -> bool:
        """Return whether to save before an evaluation now."""
        return self.saver.policy.is_due_ahead(state.train_seconds - self._trained_at_save, self._cost)

    def is_needed(self, step: int) -> bool:
        """Return whether ``step`` has not been saved, nor tried to."""
        return step not in (self._saved_step, self._tried_step)

    # --- saves ------------------------------------------------------------------------------------------------------

    def begin(self, state: TrainState, scores: Mapping[int, ValidationScore], *, copied: bool) -> None:
        """Start to write a checkpoint; no other is under way.  ``copied``: training continues meanwhile."""
        parallel = self.step.parallel
        model = saved_tensors(self.step.unit, parallel.held(), parallel.places())
        self.saver.begin(model, state_tensors(self.step.optimizer), state.to_json(), scores, copied=copied)
        self._saved_step = self._tried_step = state.step
        self._trained_at_save = state.train_seconds

    def collect(self, *, wait: bool) -> None:
        """Record the result of the save under way, if it has ended; with ``wait``, wait for its end."""
        saved = self.saver.collect(wait=wait)
        if saved is None:
            return
        for message in saved.damaged:
            self.log.event("damaged", saved.step, message=message)
        if saved.notice is not None:
            self.log.event("slow_save", saved.step, message=saved.notice)
        self._error, self._cost = saved.error, saved.seconds
        if saved.error is None:
            path = str(saved.path.relative_to(self.log.run_dir))
            seconds, held = round(saved.seconds, 3), round(saved.held_seconds, 3)
            self.log.event("save", saved.step, path=path, seconds=seconds, held_seconds=held, removed=saved.removed)
        else:
            self._report_failed(saved, saved.error)

    def forget(self) -> None:
        """Have the present step saved again."""
        self._saved_step = self._tried_step = None

    def check(self, step: int) -> None:
        """Raise TrainingFailed unless the checkpoint of ``step``, the run's last, is there."""
        if self._saved_step != step:
            raise TrainingFailed(
                f"step {step}: the checkpoint could not be written: {self._error}; {self._older_checkpoints()}; make "
                f"room, then continue with: llmtrain resume {self.log.run_dir}"
            ) from self._error
        try:
            self.saver.check_place()
        except RunDirectoryGone as error:
            raise TrainingFailed(f"step {step}: {error}") from error

    def _report_failed(self, saved: SaveResult, error: Exception) -> None:
        """Report a failed save.  A full disk does not end a run: older checkpoints are intact, and it tries again."""
        if isinstance(error, RunDirectoryGone):
            raise TrainingFailed(f"step {saved.step}: {error}") from error
        if not isinstance(error, OSError | CheckpointError):
            raise TrainingFailed(
                f"step {saved.step}: saving failed: {type(error).__name__}: {error}. Older checkpoints are untouched"
            ) from error
        if self._saved_step == saved.step:
            self._saved_step = None
        message = f"{error}; {self._older_checkpoints()}, the run continues and tries again at its next save"
        self.log.event("save_failed", saved.step, message=message)

    def _older_checkpoints(self) -> str:
        """A clause about the newest checkpoint, for messages."""
        newest = max(map(step_of, self.saver.checkpoints()), default=None)
        return "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is intact"
