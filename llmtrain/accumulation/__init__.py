"""The batch: the number of sequences in an optimizer step, and in one forward pass.

The loss of a step is the sum of its token losses over the number of its valid targets, so every split of a batch into
micro-batches gives the same gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from llmtrain.base.options import Option, RunFacts


class Stretch(NamedTuple):
    """Consecutive optimizer steps with one batch size."""

    steps: int
    batch_size: int  # sequences


class Accumulation(Option, ABC):
    """Contract of ``accumulation=...``.

    An option gives :meth:`batch_size_at`.  One whose batch size seldom or never changes also overrides
    :meth:`stretches`, from which all sums over steps are made, so that these take no time per step.
    """

    micro_batch_size: int  # sequences in a forward pass
    is_probed: ClassVar[bool] = False  # a smaller micro-batch is taken if memory has no room for this one
    batch_size_key: ClassVar[str] = "batch_size"  # the key to change for another batch size

    @abstractmethod
    def batch_size_at(self, step: int, tokens: int) -> int:
        """Sequences of optimizer step ``step`` (0-based) of a run that has trained on ``tokens`` so far.

        A pure function: the loader calls it ahead of time.
        """

    def stretches(self, steps: int, sequence_length: int) -> Iterator[Stretch]:
        """The batch sizes of the first ``steps`` steps of a run, in order."""
        position = 0
        for step in range(steps):
            batch_size = self.batch_size_at(step, position * sequence_length)
            position += batch_size
            yield Stretch(1, batch_size)

    def position_after(self, steps: int, sequence_length: int) -> int:
        """Sequences of the first ``steps`` steps: the position in the data order after them."""
        return sum(stretch.steps * stretch.batch_size for stretch in self.stretches(steps, sequence_length))

    def largest_batch(self, steps: int, sequence_length: int) -> int:
        """Sequences of the largest of the first ``steps`` steps."""
        return max(stretch.batch_size for stretch in self.stretches(steps, sequence_length))

    def steps_to(self, position: int, sequence_length: int, *, at_most: int | None = None) -> int:
        """Steps until ``position`` sequences or more are done, or ``at_most`` if these are fewer."""
        steps, left = 0, position
        limit = position if at_most is None else min(position, at_most)  # a step takes at least one sequence
        for stretch in self.stretches(limit, sequence_length):
            needed = -(-left // stretch.batch_size)
            if needed <= stretch.steps:
                return steps + needed
            steps += stretch.steps
            left -= stretch.steps * stretch.batch_size
        return steps

    def unread(self, run: RunFacts) -> dict[str, str]:
        if self.micro_batch_size <= run.largest_batch:
            return {}
        return {
            "micro_batch_size": f"a step has {run.largest_batch} sequences at most; for larger steps raise "
            f"accumulation.{self.batch_size_key}"
        }
