"""What a run finds out at its start: how much fits into memory at once, and whether compiling pays.

What was found is kept in the run's state: a resumed run computes as it did before.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.format import duration
from llmtrain.model import LanguageModel
from llmtrain.precision import Precision
from llmtrain.train.out_of_memory import is_out_of_memory
from llmtrain.train.state import TrainState

LossSum = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (inputs, targets, segments) -> sum of the losses

# compile=auto: on a GPU a compiled step saves a quarter of the time or so, and compiling takes up to a minute; from ten
# minutes on it has paid more than once over.  On a CPU the step is as long with it (benchmarks/results): the matrix
# products and attention are the same kernels, and what it fuses is as fast in torch's own.
PAYS_FROM_SECONDS = 600.0
USUAL_UTILISATION = 0.4  # of the device's matrix products, in a step that is not compiled
MAX_VARIANTS = 64  # of a compiled block: shapes, with and without gradients
SPARE = 0.03  # of a GPU's memory, kept free while sizes are tried: fragmentation and the odd tensor


@dataclass(frozen=True)
class Rehearsal:
    """A forward and backward pass on made-up tokens, which leaves nothing behind."""

    model: LanguageModel
    loss_sum: LossSum
    precision: Precision
    device: torch.device
    sequence_length: int
    is_packed: bool = False  # several examples in a row

    def __call__(self, batch_size: int, *, evaluates: bool = False) -> None:
        """Go through a micro-batch of ``batch_size`` sequences; with ``evaluates`` also without gradients."""
        tokens = torch.zeros(batch_size, self.sequence_length, dtype=torch.long, device=self.device)
        segments = torch.ones_like(tokens, dtype=torch.int32) if self.is_packed else None
        with _random_state_kept(self.device), self.precision.arithmetic():
            was_training = self.model.training
            try:
                self.model.train()
                with self.precision.autocast():
                    loss = self.loss_sum(tokens, tokens, segments)
                self.precision.scale(loss / tokens.numel()).backward()
                if evaluates:
                    self.model.eval()
                    with torch.no_grad(), self.precision.autocast():
                        self.loss_sum(tokens, tokens, segments)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            finally:
                self.model.train(was_training)
                self.model.zero_grad(set_to_none=True)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


# --- the micro-batch ------------------------------------------------------------------------------------------------


def largest_that_fits(batch_size: int, fits: Callable[[int], bool]) -> int | None:
    """Sequences of a micro-batch, so that a step of ``batch_size`` takes the fewest micro-batches; None: not even 1.

    The largest is tried first, then half of it and so on, then what lies between.  ``fits(n)`` has to be true for all
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
    """Set ``state.micro_batch_size`` to the largest that fits; the event that tells of it.

    A GPU is asked by trying.  A CPU's memory is the machine's, and a process that takes too much of it is killed:
    there ``fits_on_host`` reckons.  Raises ValueError if not even one sequence fits.
    """
    start = time.perf_counter()
    is_gpu = rehearsal.device.type == "cuda"
    found = largest_that_fits(batch_size, partial(fits_on_gpu, rehearsal) if is_gpu else fits_on_host)
    if found is None:
        raise ValueError(
            "accumulation=auto: not even one sequence at a time fits into memory; `llmtrain plan` with the same "
            "settings shows what takes it and what would make it fit"
        )
    state.micro_batch_size = found
    how = "tried" if is_gpu else "reckoned"
    parts = -(-batch_size // found)
    message = f"{found} of {batch_size} sequences at once, {parts} micro-batch{'es' if parts > 1 else ''} a step"
    seconds = round(time.perf_counter() - start, 3)
    return {"event": "micro_batch", "step": state.step, "micro_batch_size": found, "seconds": seconds,
            "message": f"{message} ({how} in {duration(seconds)})"}  # fmt: skip


def fits_on_gpu(rehearsal: Rehearsal, batch_size: int) -> bool:
    """Whether a GPU has memory for a micro-batch of ``batch_size`` sequences, by doing it."""
    device = rehearsal.device
    try:
        spare = torch.empty(
            int(SPARE * torch.cuda.get_device_properties(device).total_memory), dtype=torch.uint8, device=device
        )
        rehearsal(batch_size)
        del spare
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return True


# --- compiling ------------------------------------------------------------------------------------------------------


def compile_loss(
    rehearsal: Rehearsal,
    setting: bool | str,
    state: TrainState,
    ideal_seconds: float,
    micro_batch_size: int,
    *,
    evaluates: bool,
    cuda_graphs: bool,
) -> tuple[LossSum | None, dict[str, Any] | None]:
    """The compiled loss to train with, None for the plain one, and the event that tells of it.

    ``setting``: as ``runtime.compile``; with ``auto`` it follows from ``ideal_seconds``, what the run's matrix products
    would take at the device's full rate.  What was decided is kept in ``state``.  Compiling is done here and now, and
    where ``auto`` fails at it the run goes on without.
    """
    plain = rehearsal.loss_sum
    is_automatic = setting == "auto"
    if is_automatic and state.compiled is None:
        state.compiled = compiling_pays(rehearsal.device, ideal_seconds)
    wanted = bool(state.compiled if is_automatic else setting)
    state.compiled = False
    if not wanted:
        return None, None
    if reason := why_not_compile(rehearsal.device):
        return None, {"event": "not_compiled", "step": state.step, "message": f"{reason}; training is slower without"}
    start = time.perf_counter()
    loss_sum = GraphedLoss(plain) if cuda_graphs else CompiledLoss(rehearsal.model, plain)
    try:
        replace(rehearsal, loss_sum=loss_sum)(micro_batch_size, evaluates=evaluates)
    except Exception as error:  # the compilers below have errors of many classes, with no common one
        if is_out_of_memory(error):
            pass  # the first step will find out as well, and halve the micro-batch
        elif is_automatic:
            message = f"torch.compile failed ({summary_line(error)}); training is slower without"
            return None, {"event": "not_compiled", "step": state.step, "message": message}
        else:
            error.add_note("runtime.compile=false trains without torch.compile")
            raise
    state.compiled = True
    seconds = round(time.perf_counter() - start, 3)
    return loss_sum, {"event": "compiled", "step": state.step, "seconds": seconds,
                      "message": f"the model's blocks, in {duration(seconds)}"}  # fmt: skip


def summary_line(error: Exception) -> str:
    """What an error is about, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def compiling_pays(device: torch.device, ideal_seconds: float) -> bool:
    """Whether to compile a run whose matrix products would take ``ideal_seconds`` at the device's full rate."""
    return device.type == "cuda" and ideal_seconds / USUAL_UTILISATION > PAYS_FROM_SECONDS


def why_not_compile(device: torch.device) -> str | None:
    """What ``torch.compile`` lacks here; None if nothing."""
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        return "torch.compile needs a C++ compiler on a CPU (g++)"
    if sys.version_info >= (3, 15):
        return "torch.compile does not know this Python yet"
    return None


class CompiledLoss:
    """``loss_sum`` with the model's blocks through ``torch.compile``, one compilation for all of them.

    Only the blocks: they are alike, so that this takes as long as one of them, whatever the model's depth.
    """

    def __init__(self, model: LanguageModel, loss_sum: LossSum) -> None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
        self.model = model
        self.loss_sum = loss_sum
        self.blocks = [torch.compile(block, dynamic=False) for block in model.blocks]

    def __call__(self, inputs: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        with self.model.running(self.blocks):
            return self.loss_sum(inputs, targets, segments)


class GraphedLoss:
    """``loss_sum`` of the whole model compiled, its kernels launched as CUDA graphs: for small models on a fast GPU.

    A graph holds one shape: what has another one (the rest of an evaluation) is recorded too.
    """

    def __init__(self, loss_sum: LossSum) -> None:
        self.compiled: LossSum = torch.compile(loss_sum, dynamic=False, mode="reduce-overhead")

    def __call__(self, inputs: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(
            inputs, targets, segments
        ).clone()  # the graph's own memory is written again by the next call
