"""Some positions of every sequence: the contract with a program that computes the others elsewhere.

Everything in a decoder but attention is about one position.  In attention a query sees keys of the whole sequence, so
keys and values are gathered there, and queries stay.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class SequencePart(ABC):
    """The positions that a model computes of every sequence, the same ones of all sequences of one length."""

    whole_length: int  # of the sequences that are computed now

    @abstractmethod
    def stretches(self, length: int) -> Sequence[range]:
        """The positions of the ``length`` tokens of this part, in order, as ranges without a gap."""

    @abstractmethod
    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of whole sequences, of those of this part: ``(batch, heads, length, head_size)`` each.

        Differentiable: this part receives the gradients of its own from the queries of all parts.
        """

    def positions(self, length: int, device: torch.device) -> Tensor:
        """The positions ``(length,)`` of the tokens of this part."""
        stretches = self.stretches(length)
        return torch.cat([torch.arange(each.start, each.stop, device=device) for each in stretches])
