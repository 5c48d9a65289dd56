"""The parts of tensors that ranks hold: what a rank trains, and what checkpoints are written from and read into.

Importing this module does not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

# Keys of optimizer state that exist where replicas train on their own between two exchanges (``Place.replica``).
OWN_WEIGHT = "own_weight"  # the weight that the replica trains; the model of a checkpoint has the common ones
OUTER_MOMENTUM = "outer_momentum"  # of the outer optimizer; all replicas hold the same


@dataclass(frozen=True)
class Replica:
    """The number of this rank's replica among those whose weights and optimizer state differ."""

    number: int
    count: int


@dataclass(frozen=True)
class Place:
    """The part of a whole tensor that this rank holds: a box."""

    offset: Shape  # of its first element in the whole
    whole: Shape  # shape of the whole tensor
    is_owner: bool  # True: this rank writes it, of those that hold the same elements
    shape: Shape | None = None  # of the part, where a rank holds several of one tensor; None: all that it holds
    stored: Shape | None = None  # shape of the whole in a model's file, without padding at its ends; None: ``whole``
    replica: Replica | None = None  # the optimizer state is that of this replica; None: one state for all ranks

    @property
    def first_element(self) -> int:
        """The number, in the whole tensor, of its first element."""
        number = 0
        for begin, size in zip(self.offset, self.whole, strict=True):
            number = number * size + begin
        return number


# By the name of a parameter.  Several places: the rank's tensor has the parts one after the other along its first
# dimension, each with its ``shape``.  A tensor of one dimension may hold parts of more, each flattened.  No place, ():
# the rank holds nothing of the tensor, others hold all of it.
Places = Mapping[str, Place | Sequence[Place]]


def places_of(found: Place | Sequence[Place]) -> Sequence[Place]:
    """The places of one name as a sequence."""
    return (found,) if isinstance(found, Place) else found
