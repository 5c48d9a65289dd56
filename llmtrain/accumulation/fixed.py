"""The same batch size at every step."""

from dataclasses import dataclass

from llmtrain.accumulation import Accumulation, Change
from llmtrain.base.checks import positive


@dataclass(frozen=True)
class FixedBatch(Accumulation):
    """``batch_size`` sequences in an optimizer step, ``micro_batch_size`` at once; the last ones may be fewer."""

    batch_size: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        positive(batch_size=self.batch_size, micro_batch_size=self.micro_batch_size)

    def batch_size_at(self, step: int, tokens: int) -> int:
        return self.batch_size

    def next_change(self, step: int, tokens: int) -> Change:
        return Change()
