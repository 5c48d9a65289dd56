"""The processes that train a run together, as the parts of a run see them.

Importing this module does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class World(ABC):
    """The ranks of a run: ``rank`` of ``size``, and agreements among them.

    Every rank calls the methods in the same order.  :meth:`sum` is queued on the device, the host does not wait; the
    others are about values on the host, which waits for all ranks.
    """

    rank: int
    size: int
    local_size: int  # ranks on this rank's machine
    host: str  # name of this rank's machine

    @property
    def is_first(self) -> bool:
        """True for rank 0, which alone makes the run directory, writes logs and shows a display."""
        return self.rank == 0

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over all ranks, the same bits on each; returns it."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is true on one."""

    @abstractmethod
    def share(self, value: Any) -> Any:
        """The ``value`` of rank 0, as JSON can hold it, on every rank."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, as JSON can hold them, in their order, on every rank."""

    def mark(self, phase: str, step: int) -> None:  # noqa: B027 (nobody may watch)
        """Record the phase of this rank, by a name of :class:`llmtrain.distributed.phases.Phase`; costs nothing."""

    def begin(self, run_dir: Path) -> None:  # noqa: B027
        """Take the run's directory into use: for the logs of ranks, and for whoever watches them."""

    def show_with(self, notify: Callable[[str], bool]) -> None:  # noqa: B027
        """Show what is found out about other ranks with ``notify``, which returns whether it could."""

    def saving(self) -> AbstractContextManager[None]:
        """Context of this rank's own work on a checkpoint, without waiting for others: in another thread.

        The process is not killed in it for the failure of another, and named if it takes too long.
        """
        return nullcontext()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def separate(self) -> World:
        """The same ranks with a connection of its own, for another thread, whose calls come in another order."""
        return self

    def first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0; its result, as JSON can hold it, and a ValueError of it, are those of every rank."""
        outcome: list[Any] = []
        error: ValueError | None = None
        if self.is_first:
            try:
                outcome = [work()]
            except ValueError as caught:
                error, outcome = caught, [None, str(caught)]
        outcome = self.share(outcome)
        if len(outcome) > 1:
            raise error or ValueError(outcome[1])
        return outcome[0]


class Alone(World):
    """One process: agreements cost nothing."""

    rank, size, local_size, host = 0, 1, 1, ""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def any(self, flag: bool) -> bool:
        return flag

    def share(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        return work()


ALONE = Alone()
