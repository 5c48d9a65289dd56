"""The size of a micro-batch, found at the start of a run.

It is kept in the run's state: a resumed run computes as before.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from llmtrain.base.format import duration
from llmtrain.train.out_of_memory import is_out_of_memory
from llmtrain.train.rehearsal import Rehearsal
from llmtrain.train.state import TrainState

SPARE = 0.03  # share of a GPU's memory that is kept free while sizes are tried: for fragmentation and small tensors


# --- the micro-batch ------------------------------------------------------------------------------------------------


def largest_that_fits(batch_size: int, fits: Callable[[int], bool]) -> int | None:
    """The size of a micro-batch with which a step of ``batch_size`` takes the fewest; None: not even 1 fits.

    The largest is tried first, then half of it and so on, then the sizes between.  ``fits(n)`` has to be true for all
    sizes below one that fits.
    """
    too_few, enough = 0, 1  # micro-batches a step
    while not fits(-(-batch_size // enough)):
        if enough == batch_size:
            return None
        too_few, enough = enough, min(2 * enough, batch_size)
    while enough - too_few > 1:
        between = (too_few + enough) // 2
        if fits(-(-batch_size // between)):
            enough = between
        else:
            too_few = between
    return -(-batch_size // enough)


def fit_micro_batch(
    rehearsal: Rehearsal, batch_size: int, state: TrainState, fits_on_host: Callable[[int], bool]
) -> dict[str, Any]:
    """Set ``state.micro_batch_size`` to the largest that fits; return the event that reports it.

    On a GPU sizes are tried.  On a CPU a process that takes too much memory is killed, so there ``fits_on_host``
    estimates.  Raises ValueError if not even one sequence fits.
    """
    start = time.perf_counter()
    is_gpu = rehearsal.device.type == "cuda"
    fits = partial(fits_on_device, rehearsal, batch_size, spare_bytes(rehearsal.device)) if is_gpu else fits_on_host
    found = largest_that_fits(batch_size, fits)
    if found is None:
        raise ValueError(
            "accumulation=auto: not even one sequence at a time fits into memory; `llmtrain plan` with the same "
            "settings shows where it goes and what would make it fit"
        )
    state.micro_batch_size = found
    how = "tried" if is_gpu else "estimated"
    parts = -(-batch_size // found)
    message = f"{found} of {batch_size} sequences at once, {parts} micro-batch{'es' if parts > 1 else ''} a step"
    seconds = round(time.perf_counter() - start, 3)
    return {"event": "micro_batch", "step": state.step, "micro_batch_size": found, "seconds": seconds,
            "message": f"{message} ({how} in {duration(seconds)})"}  # fmt: skip


def spare_bytes(device: torch.device) -> int:
    """The memory of a GPU that is kept free while sizes are tried."""
    return int(SPARE * torch.cuda.get_device_properties(device).total_memory)


def fits_on_device(rehearsal: Rehearsal, batch_size: int, spare: int, micro_batch_size: int) -> bool:
    """Try a step of ``batch_size`` sequences in such micro-batches; return whether the device has memory for it.

    ``spare`` bytes are taken meanwhile.
    """
    try:
        taken = torch.empty(spare, dtype=torch.uint8, device=rehearsal.device)
        rehearsal(micro_batch_size, batch_size)
        del taken
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if rehearsal.device.type == "cuda":
            torch.cuda.empty_cache()
    return True
