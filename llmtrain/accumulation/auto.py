"""The largest micro-batch that fits."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.accumulation import Accumulation
from llmtrain.base.checks import positive


@dataclass(frozen=True)
class AutoBatch(Accumulation):
    """``batch_size`` sequences an optimizer step, as many of them at once as memory has room for.

    How many that is, is tried at the start of a run and kept in its checkpoints: whatever is chosen, the gradient is
    the same.
    """

    batch_size: int
    is_probed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(batch_size=self.batch_size)

    @property
    def micro_batch_size(self) -> int:  # type: ignore[override]
        """The most that there can be."""
        return self.batch_size

    def batch_size_at(self, step: int, tokens: int) -> int:
        return self.batch_size
