"""The policy of writing and keeping checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.base.checks import non_negative
from llmtrain.base.options import Option, RunFacts

SHORT_SAVE = 1.0  # seconds: a save this short is made before every evaluation
MAX_SHARE = 0.1  # of the training since the last save: the most that a longer save before an evaluation may take


@dataclass(frozen=True)
class Checkpoint(Option):
    """The ``checkpoint`` group."""

    every_steps: int
    every_minutes: float
    before_evaluation: bool
    asynchronous: bool
    keep_last: int
    keep_best: int
    keep_every: int

    def __post_init__(self) -> None:
        non_negative(
            every_steps=self.every_steps,
            every_minutes=self.every_minutes,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            keep_every=self.keep_every,
        )

    def unread(self, run: RunFacts) -> dict[str, str]:
        unread = super().unread(run)
        if self.every_steps > run.steps:
            unread["every_steps"] = f"{run.end}, where one is written in any case; checkpoint.every_steps={run.tenth}"
        if self.keep_every > run.steps:
            unread["keep_every"] = f"{run.end}, so that no step is a multiple; checkpoint.keep_every={run.tenth}"
        if not run.evaluates:
            unread["keep_best"] = run.no_evaluation
        if not self.keep_last:
            why = "checkpoint.keep_last=0 keeps all; checkpoint.keep_last=2"
            unread |= {"keep_best": why, "keep_every": why}
        return unread

    def is_due(self, step: int, seconds: float) -> bool:
        """Return whether to save after ``step`` steps, ``seconds`` after the last save."""
        by_steps = self.every_steps > 0 and step % self.every_steps == 0
        return by_steps or 0 < 60 * self.every_minutes <= seconds

    def copies_between(self, first: int, last: int) -> bool:
        """Return whether a run from step ``first`` to step ``last`` may write a checkpoint while training continues."""
        by_steps = self.every_steps > 0 and (first // self.every_steps + 1) * self.every_steps < last
        return self.asynchronous and (by_steps or self.every_minutes > 0)

    def is_due_ahead(self, trained: float, cost: float) -> bool:
        """Return whether to save before an evaluation, ``trained`` seconds of training after a save that took ``cost``.

        A failed evaluation would lose that training.  ``cost`` is 0 before the first save.
        """
        return self.before_evaluation and (cost < SHORT_SAVE or cost <= MAX_SHARE * trained)

    def kept(self) -> int:
        """The number of checkpoints on the disk in the long run, apart from those of ``keep_every``; at least 1."""
        return max(self.keep_last, 1) + self.keep_best

    def keeps_best(self, step: int) -> bool:
        """Return whether the checkpoint at ``step`` stays for as long as it is the best."""
        return not self.keep_last or self.keep_best > 0 or (self.keep_every > 0 and step % self.keep_every == 0)

    def superfluous(self, steps: Sequence[int], standings: Mapping[int, Any]) -> set[int]:
        """Choose those of the intact checkpoints at ``steps`` that need not be kept.

        ``standings``: the scores of evaluated steps, the least being the best.  ``keep_last=0`` keeps all.
        """
        if not self.keep_last:
            return set()
        kept = set(sorted(steps)[-self.keep_last :])
        judged = sorted((standings[step], step) for step in steps if step in standings)
        kept |= {step for _, step in judged[: self.keep_best]}
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        return set(steps) - kept
