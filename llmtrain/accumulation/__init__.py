"""How many sequences make an optimizer step, and how many go through the model at once.

The loss of a step is the sum of its token losses over the number of its valid targets, so every split of one
batch into micro-batches gives the same gradient.
"""

from abc import ABC, abstractmethod
from typing import ClassVar


class Accumulation(ABC):
    """Contract of ``accumulation=...``."""

    micro_batch_size: int  # sequences per forward pass
    is_probed: ClassVar[bool] = False  # whether fewer are taken at once if memory has no room for them

    @abstractmethod
    def batch_size_at(self, step: int, tokens: int) -> int:
        """Sequences of optimizer step ``step`` (0-based) of a run that has trained on ``tokens`` so far.

        A pure function: the loader asks it ahead of time.
        """
