"""The largest micro-batch that fits."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.accumulation import Accumulation, Change
from llmtrain.base.checks import positive


@dataclass(frozen=True)
class AutoBatch(Accumulation):
    """``batch_size`` sequences in an optimizer step, as many of them at once as fit into memory.

    Their number is found by trying, at the start of a run, and kept in its checkpoints.  The gradient does not depend
    on it.
    """

    batch_size: int
    is_probed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(batch_size=self.batch_size)

    @property
    def micro_batch_size(self) -> int:  # type: ignore[override]
        """The largest possible micro-batch: the whole batch."""
        return self.batch_size

    def batch_size_at(self, step: int, tokens: int) -> int:
        return self.batch_size

    def next_change(self, step: int, tokens: int) -> Change:
        return Change()
