"""No mesh yet: the option with which ``plan`` ranks those that fit.

Importing this module does not import torch.
"""

from dataclasses import dataclass
from typing import NoReturn

from llmtrain.distributed.options import Distributed, Mesh


@dataclass(frozen=True)
class Auto(Distributed):
    """The mesh that ``plan`` finds to be the fastest; a run needs one that is named."""

    def mesh(self, size: int) -> Mesh:
        refuse()

    def local_processes(self, gpus: int) -> int:
        refuse()


def refuse() -> NoReturn:
    """Raise ValueError: nothing but a plan can have this option."""
    raise ValueError(
        "distributed=auto: a run needs a mesh that is named; llmtrain plan distributed=auto devices=8 device=h100-80gb "
        "ranks those that fit and prints their overrides"
    )
