"""Step decay: the learning rate is multiplied by a factor at certain steps."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from llmtrain.base.checks import fraction, positive
from llmtrain.base.options import RunFacts
from llmtrain.schedule.warmup import Warmup


@dataclass(frozen=True)
class StepDecay(Warmup):
    """``peak * factor ** n``, with n the number of milestones reached, or of periods of ``every`` steps passed.

    Steps count from the start of the run, warm-up included, as in torch's ``MultiStepLR`` and ``StepLR``.
    """

    milestones: list[int]
    every: int | None
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(every=self.every)
        fraction(factor=self.factor)
        if bool(self.milestones) == (self.every is not None):
            raise ValueError(
                f"milestones={self.milestones}, every={self.every}: give one and leave the other [] or null"
            )
        if any(later <= earlier for earlier, later in pairwise([0, *self.milestones])):
            raise ValueError(f"milestones={self.milestones}: must be steps after 0 that increase")

    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        times = bisect_right(self.milestones, step) if self.every is None else step // self.every
        return peak * self.factor**times

    def unread(self, run: RunFacts) -> dict[str, str]:
        unread = super().unread(run)
        if (self.every or self.milestones[0]) >= run.steps:
            why = f"{run.end}, before the learning rate drops for the first time; a drop before step {run.steps}"
            unread |= {"milestones": why, "every": why, "factor": why}
        return unread
