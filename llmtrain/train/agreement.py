"""Decisions that all ranks of a run take at the same step: to stop, and to save by the clock."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmtrain.base.world import World

STOPS, STOPPING_RANKS, SAVES = "stop_flags", "stopping_ranks", "save_flags"  # among the numbers of a step


class Agreement:
    """The wishes of the ranks, carried by the sums of a step's losses, so that no rank waits for them.

    A signal reaches one rank, and clocks differ.  Each rank adds its wishes to a step, and all act on the sums when the
    numbers of that step have arrived, which is at the same step on each.  A single process acts on its own wishes.

    ``own_reason`` gives this rank's reason to stop, once there is one.
    """

    def __init__(self, world: World, device: torch.device, own_reason: Callable[[], str | None]) -> None:
        self.world = world
        self.device = device
        self.own_reason = own_reason
        self.saves = False  # agreed: a save is due by the clock of rank 0
        self._stops = False  # agreed
        self._stopping_rank = 0  # one of those that wished to stop

    def flags(self, is_save_due: Callable[[], bool]) -> Tensor | None:
        """The wishes of this rank as a tensor on the device; None with a single process.

        ``is_save_due``: by the clock of this rank.
        """
        if self.world.size == 1:
            return None
        stops = float(self.own_reason() is not None)
        values = (stops, stops * self.world.rank, float(self.world.is_first and is_save_due()))
        return torch.stack([torch.full((), value, device=self.device) for value in values])

    def scalars(self, sums: Tensor | None) -> dict[str, Tensor]:
        """The sums of all ranks' :meth:`flags`, by the names that :meth:`record` reads them under."""
        return {} if sums is None else {STOPS: sums[0], STOPPING_RANKS: sums[1], SAVES: sums[2]}

    def record(self, values: Mapping[str, float]) -> None:
        """Take the sums of a step whose numbers have arrived."""
        if values.get(STOPS):
            self._stops = True
            self._stopping_rank = round(values[STOPPING_RANKS] / values[STOPS])
        self.saves |= bool(values.get(SAVES))

    def reason(self) -> str | None:
        """The reason to stop now; None as long as there is none that the ranks agree on."""
        if self.world.size == 1:
            return self.own_reason()
        return (self.own_reason() or f"a signal to rank {self._stopping_rank}") if self._stops else None

    def reason_at_once(self) -> str | None:
        """The same where there is no step to agree by: every rank calls it at the same point, and waits for all."""
        if self.world.size > 1:
            self._stops |= self.world.any(self.own_reason() is not None)
        return self.reason()
