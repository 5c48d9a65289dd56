"""``distributed=local_sgd``: replicas that train on their own and exchange their progress every H steps.

DiLoCo (Douillard et al. 2023, https://arxiv.org/abs/2311.08105).  Importing this module does not import torch.
"""

from dataclasses import dataclass
from enum import Enum

from llmtrain.base.checks import positive
from llmtrain.base.options import RunFacts
from llmtrain.distributed.options import Distributed

BLOCK = 128  # outer gradients with one scale, where they are exchanged in 8 bits
SCALE_BYTES = 4  # of such a scale


class Exchange(Enum):
    """The format in which replicas exchange their outer gradients; they are added up in fp32 in each."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"  # with one fp32 scale for each block: what is lost by rounding is not sent later

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of one outer gradient."""
        return {Exchange.fp32: 4.0, Exchange.bf16: 2.0, Exchange.int8: 1 + SCALE_BYTES / BLOCK}[self]


@dataclass(frozen=True)
class LocalSgd(Distributed):
    """Replicas that exchange their progress every ``sync_every`` steps, and at the last step of a run.

    Between two exchanges each process trains its own weights on its own sequences, by the run's (inner) optimizer.  At
    an exchange the differences from the common weights, the outer gradients, are averaged over the replicas, and an
    outer SGD with Nesterov momentum updates the common weights, which all replicas take up.

    A replica does not count in an average whose outer gradient is not finite, or that has not changed a weight since
    the last exchange; it takes up the common weights.  One that misses a round by ``missed_rounds`` neither counts nor
    takes up anything, trains on from its own weights, and counts in its next round.
    """

    sync_every: int
    outer_lr: float
    outer_momentum: float
    exchange: Exchange
    missed_rounds: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, degree in self.degrees.items():
            if key != "replicate" and degree != 1:
                raise ValueError(
                    f"{key}={degree}: with distributed=local_sgd a replica is one process, which holds all weights; "
                    f"take distributed.{key}=1, or distributed=fsdp for a model that needs several"
                )
        positive(sync_every=self.sync_every, outer_lr=self.outer_lr)
        for name, value in (("outer_momentum", self.outer_momentum), ("missed_rounds", self.missed_rounds)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value}: must be at least 0 and below 1")

    def unread(self, run: RunFacts) -> dict[str, str]:
        unread = super().unread(run)
        if self.sync_every >= run.steps:
            why = f"{run.end}, where the only exchange is made in any case; distributed.sync_every={run.tenth}"
            unread["sync_every"] = why
        return unread

    def exchanges_at(self, step: int) -> bool:
        """Return whether the replicas exchange after ``step`` steps, apart from the end of a run."""
        return step % self.sync_every == 0
