"""Asynchronous reading of a step's numbers from the device."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class StepRecord:
    """The facts of a step that the host knows, and the numbers that the device delivers later."""

    step: int  # 1-based: steps done
    position: int  # of the step's first sequence in the data order
    tokens: int  # of this step, without padding
    total_tokens: int  # of the run up to and with this step
    batch_size: int
    learning_rate: float
    flops: int  # of this step, by the formula of the model
    losses: tuple[str, ...] = ()  # names of the parts of the loss, where there is more than one
    values: dict[str, float] = field(default_factory=dict)  # filled when the device has finished the step


class Readback:
    """A queue of records whose numbers are copied to the host while the device continues.

    On a GPU each record's scalars are copied to pinned memory, followed by an event; :meth:`ready` returns the records
    whose event has passed.  At most ``depth`` steps are pending: the host stays close to the device, and the device
    always has work.  On a CPU a record is ready at once.  Without ``is_early`` a record is never returned before it is
    more than ``depth`` steps back, on a GPU: ranks that act on it have to do so at the same step.
    """

    def __init__(self, device: torch.device, depth: int = 2, *, is_early: bool = True) -> None:
        self.device = device
        self.depth = depth
        self.is_early = is_early
        self.pending: deque[tuple[StepRecord, tuple[str, ...], Tensor, torch.cuda.Event | None]] = deque()

    def push(self, record: StepRecord, scalars: dict[str, Tensor]) -> None:
        """Queue ``record`` with its 0-dimensional tensors."""
        stacked = torch.stack([scalar.detach().float() for scalar in scalars.values()])
        event = None
        if self.device.type == "cuda":
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            stacked = host
        self.pending.append((record, tuple(scalars), stacked, event))

    def ready(self) -> list[StepRecord]:
        """Return the records that have arrived, in order; wait only for those more than ``depth`` steps back."""
        return self._take(wait_for=len(self.pending) - self.depth)

    def drain(self) -> list[StepRecord]:
        """Wait for the device and return all records."""
        return self._take(wait_for=len(self.pending))

    def _take(self, wait_for: int) -> list[StepRecord]:
        records: list[StepRecord] = []
        while self.pending:
            record, names, tensor, event = self.pending[0]
            if event is not None and not (self.is_early and event.query()):
                if len(records) >= wait_for:
                    break
                event.synchronize()
            self.pending.popleft()
            record.values = dict(zip(names, tensor.tolist(), strict=True))
            records.append(record)
        return records
