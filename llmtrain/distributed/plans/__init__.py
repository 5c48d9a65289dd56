"""The cut of an architecture for tensor parallelism: the layers of a block whose work the ranks share.

A rank has some of the heads and some of the channels between the two halves of a feed-forward network.  The layers that
make them are cut by outputs, those that read them by inputs; so a block needs two sums over the ranks in each
direction.  A model itself knows nothing of ranks.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The cut of a decoder; names are those of modules within a block."""

    shared: tuple[str, ...]  # modules whose input, the first argument, all ranks need as a whole
    by_outputs: Mapping[str, tuple[int, ...]]  # layers, and the sizes of their sections, each of which is cut evenly
    by_inputs: tuple[str, ...]  # layers
    stream_norms: tuple[str, ...]  # applied to the residual stream
    head_norms: tuple[str, ...]  # applied to heads, with the same weights for all of them
    counts: Mapping[str, int]  # of the keys of ``model`` that the number of ranks has to divide
    set_heads: Callable[[int, int], None]  # tell the modules that they have the heads of a rank, of so many
    first: str = "dropout"  # the module of the model behind the embeddings: its input is the residual stream
    last: str = "final_norm"  # its output is the residual stream's

    def check(self, ranks: int) -> None:
        """Raise ValueError unless ``ranks`` can share the blocks."""
        for key, count in self.counts.items():
            if count % ranks:
                common = math.gcd(*self.counts.values())
                fitting = max(n for n in range(1, ranks) if common % n == 0)
                remedy = "distributed.tensor=1" if fitting == 1 else f"distributed.tensor={fitting} would do"
                raise ValueError(
                    f"distributed.tensor={ranks}: model.{key}={count} must be divisible by it; "
                    + (remedy if fitting > 1 else f"take {remedy} and another way to share, distributed=fsdp")
                )
