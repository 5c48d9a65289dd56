"""The batch: the number of sequences in an optimizer step, and in one forward pass.

The loss of a step is the sum of its token losses over the number of its valid targets, so every split of a batch into
micro-batches gives the same gradient.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from llmtrain.base.options import Option, RunFacts


class Change(NamedTuple):
    """The next point at which a batch size may be another, in steps or in tokens; None: not by these."""

    step: int | None = None  # 0-based, of the first step that may have another size
    tokens: int | None = None  # trained on before it


class Accumulation(Option, ABC):
    """Contract of ``accumulation=...``.

    An option gives :meth:`batch_size_at`.  One whose batch size seldom or never changes also overrides
    :meth:`next_change`, so that counting the steps of a run takes no time per step.
    """

    micro_batch_size: int  # sequences in a forward pass
    is_probed: ClassVar[bool] = False  # a smaller micro-batch is taken if memory has no room for this one
    batch_size_key: ClassVar[str] = "batch_size"  # the key to change for another batch size

    @abstractmethod
    def batch_size_at(self, step: int, tokens: int) -> int:
        """Sequences of optimizer step ``step`` (0-based) of a run that has trained on ``tokens`` so far.

        A pure function: the loader calls it ahead of time.
        """

    def next_change(self, step: int, tokens: int) -> Change:
        """The point up to which the batch size stays that of ``step`` and ``tokens``."""
        return Change(step=step + 1)

    def unread(self, run: RunFacts) -> dict[str, str]:
        if self.micro_batch_size <= run.largest_batch:
            return {}
        return {
            "micro_batch_size": f"a step has {run.largest_batch} sequences at most; for larger steps raise "
            f"accumulation.{self.batch_size_key}"
        }
