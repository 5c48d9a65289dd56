"""Robust statistics of the recent accepted steps, kept and computed on the device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.stored_files import NUMBER, refuse

QUANTITIES = ("loss", "grad_norm")  # the rows of every tensor below
MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class Window:
    """The losses and gradient norms of the last ``size`` accepted steps, and the limits that follow from them.

    The limit of a quantity is ``median + deviations * max(1.4826 * MAD, floor * |median|)``, where MAD is the median of
    the distances from the median.  A few outliers, however large, hardly move either median.  There is no limit
    (inf) while fewer than ``min_steps`` steps are in the window, if ``deviations`` is 0, and if the values do not vary
    and the floor gives no measure either: no floor, or a median of 0.

    The host never waits: the number of values is a tensor too, and empty slots hold inf, which sorts to the end.
    Medians are taken from sorted values, since ``torch.median`` along a dimension is not deterministic on a GPU.
    """

    def __init__(
        self, device: torch.device, size: int, min_steps: int, deviations: Sequence[float], floors: Sequence[float]
    ) -> None:
        assert len(deviations) == len(floors) == len(QUANTITIES)
        assert 1 <= min_steps <= size
        self.size, self.min_steps = size, min_steps
        self.values = torch.full((len(QUANTITIES), size), torch.inf, device=device)  # fp32, a ring in each row
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # steps added since the last restart
        self.slots = torch.arange(size, device=device)
        self.deviations = torch.tensor(deviations, dtype=torch.float32, device=device)
        self.floors = torch.tensor(floors, dtype=torch.float32, device=device)
        self.not_judged = self.deviations == 0
        self.before_middle = torch.tensor([-1, 0], device=device)

    def limits(self) -> Tensor:
        """The limit of each of :data:`QUANTITIES`, ``(2,)``."""
        filled = self.count.clamp(1, self.size)
        middle = (filled + self.before_middle) // 2  # the two values whose mean is the median; the same if odd
        median = self._median(self.values, middle)
        mad = self._median((self.values - median[:, None]).abs(), middle)
        spread = torch.maximum(MAD_TO_SIGMA * mad, self.floors * median.abs())
        unknown = self.not_judged | (self.count < self.min_steps) | (spread == 0)
        return (median + self.deviations * spread).masked_fill(unknown, torch.inf)

    @staticmethod
    def _median(values: Tensor, middle: Tensor) -> Tensor:
        return values.sort(dim=1).values.index_select(1, middle).mean(dim=1)

    def add(self, observed: Tensor, accepted: Tensor) -> None:
        """Add a step's ``observed`` quantities ``(2,)``, if ``accepted`` (bool, 0-dimensional)."""
        here = (self.slots == self.count % self.size) & accepted
        self.values = torch.where(here, observed[:, None], self.values)
        self.count = self.count + accepted

    def restart(self) -> None:
        """Forget every step."""
        self.values.fill_(torch.inf)
        self.count.zero_()

    def state_dict(self) -> dict[str, list[float]]:
        """The values by quantity, oldest first; waits for the device."""
        count = int(self.count.item())
        rows = self.values.roll(-(count % self.size) if count > self.size else 0, dims=1)[:, : min(count, self.size)]
        return dict(zip(QUANTITIES, rows.tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the values of ``state``, the newest of them if they are too many."""
        self.restart()
        stored = [state.get(name, []) for name in QUANTITIES]
        if not all(isinstance(row, list) and all(map(NUMBER.holds, row)) for row in stored):
            refuse("recovery.window", "must hold lists of numbers")
        if len({len(row) for row in stored}) > 1:
            refuse("recovery.window", f"{' and '.join(QUANTITIES)} differ in length")
        rows = torch.tensor(stored, dtype=torch.float32)[:, -self.size :]
        self.values[:, : rows.shape[1]] = rows.to(self.values.device)
        self.count.fill_(rows.shape[1])
