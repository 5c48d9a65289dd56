"""A batch size that grows (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162; GPT-3, section 2.3)."""

from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import ClassVar

from llmtrain.accumulation import Accumulation, Change
from llmtrain.base.checks import positive
from llmtrain.base.options import RunFacts


class Unit(Enum):
    """The unit of the starts of the stages."""

    steps = "steps"
    tokens = "tokens"


@dataclass(frozen=True)
class Stage:
    """``batch_size`` sequences in an optimizer step once ``start`` steps or tokens are done."""

    start: int
    batch_size: int


@dataclass(frozen=True)
class RampedBatch(Accumulation):
    """The batch size of the last stage that has started; ``micro_batch_size`` sequences at once."""

    stages: list[Stage]
    unit: Unit
    micro_batch_size: int
    batch_size_key: ClassVar[str] = "stages"

    def __post_init__(self) -> None:
        positive(micro_batch_size=self.micro_batch_size)
        for i, stage in enumerate(self.stages):
            positive(**{f"stages[{i}].batch_size": stage.batch_size})
        starts = [stage.start for stage in self.stages]
        if starts[:1] != [0] or any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"stages: start={starts}: the starts must begin at 0 and increase")

    def batch_size_at(self, step: int, tokens: int) -> int:
        return self.stages[self._stage(step, tokens)].batch_size

    def next_change(self, step: int, tokens: int) -> Change:
        following = self.stages[self._stage(step, tokens) + 1 :]
        if not following:
            return Change()
        return Change(step=following[0].start) if self.unit is Unit.steps else Change(tokens=following[0].start)

    def _stage(self, step: int, tokens: int) -> int:
        """The number of the last stage that has started."""
        done = step if self.unit is Unit.steps else tokens
        return bisect_right(self.stages, done, key=lambda stage: stage.start) - 1

    def unread(self, run: RunFacts) -> dict[str, str]:
        unread = super().unread(run)
        end = run.steps if self.unit is Unit.steps else run.tokens
        if self.stages[-1].start >= end:
            unread["stages"] = f"in part: {run.end}, before the last stage; earlier starts, or a longer run"
        if len(self.stages) > 1 and self.stages[1].start >= end:
            unread[self.ITSELF] = (
                f"{run.end}, before the batch grows for the first time; earlier starts in accumulation.stages"
            )
        return unread
