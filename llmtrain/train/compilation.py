"""Compilation of the training unit: the decision, the requirements, and the work."""

import logging
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from llmtrain.base.format import duration
from llmtrain.base.trusted_files import prepare_compiler_cache
from llmtrain.train.out_of_memory import is_out_of_memory
from llmtrain.train.rehearsal import Rehearsal
from llmtrain.train.state import TrainState

log = logging.getLogger(__name__)

# compile=auto: on a GPU a compiled step saves a quarter of the time or more.  Compiling a block takes some 10 s the
# first time, all of 12 in one graph 30 to 60 s, and seconds from then on, since torch keeps the code: in two minutes of
# training it has paid, or will have the next time.  Rows of different lengths are compiled for each (up to ten, see
# llmtrain.data.batch.widened), and a tenth of their tokens is additional padding: that takes ten minutes to pay.
# On a CPU the step is as long with it (benchmarks/results): the matrix products and attention are the same kernels, and
# what it fuses is as fast in torch's own.
PAYS_FROM_SECONDS = 120.0
PAYS_FROM_SECONDS_WITH_PADDING = 600.0
USUAL_UTILISATION = 0.4  # of the device's matrix products, in a step that is not compiled

# All blocks in one graph are 2 to 4% faster than one by one: the norm of a block is fused with the end of the one
# before, and the host makes one call and not one a block.  The time of compiling grows with the number of blocks, so
# deeper models, whose kernels are longer, keep the one compilation for all.  So do blocks with activation
# checkpointing, whose memory depends on the order of what is recomputed or moved to the host (a graph gives its results
# to the hooks of offloading only at its end), and rows of different lengths, each of which would take the long
# compilation.
MAX_LAYERS_AS_ONE = 24


@dataclass(frozen=True)
class CompileSettings:
    """The settings that decide about compilation."""

    setting: bool | str  # as ``runtime.compile``
    cuda_graphs: bool
    ideal_seconds: float  # of the run's matrix products at the device's full rate: for ``auto``
    pads: bool  # rows of the data are of different lengths
    recomputes: bool  # activations are recomputed or moved to the host
    is_sharded: bool = False  # weights are gathered for a block at a time, between graphs


def compile_unit(
    rehearsal: Rehearsal, settings: CompileSettings, state: TrainState, micro_batch_size: int, batch_size: int
) -> dict[str, Any] | None:
    """Compile the unit of ``rehearsal`` as ``settings`` say; return the event that reports it, None for none.

    The decision is kept in ``state``: a resumed run computes as before.  The unit is compiled at once, and where that
    fails under ``auto`` the run continues without it.
    """
    unit, is_automatic = rehearsal.step.unit, settings.setting == "auto"
    if is_automatic and state.compiled is None:
        wanted = compiling_pays(rehearsal.device, settings.ideal_seconds, pads=settings.pads)
    else:
        wanted = bool(state.compiled if is_automatic else settings.setting)
    state.compiled = False
    if not wanted:
        return None
    if reason := why_not_compile(rehearsal.device):
        return {"event": "not_compiled", "step": state.step, "message": f"{reason}; training is slower without"}
    start = time.perf_counter()
    prepare_compiler_cache()
    rehearsal.step.precision.is_compiled = True
    try:
        done = _compile(rehearsal, settings, micro_batch_size, batch_size)
    except Exception as error:  # the compilers below have errors of many classes, with no common one
        if is_automatic:
            unit.undo_compilation()
            rehearsal.step.precision.is_compiled = False
            message = f"torch.compile failed ({summary_line(error)}); training is slower without"
            return {"event": "not_compiled", "step": state.step, "message": message}
        error.add_note("runtime.compile=false trains without torch.compile")
        raise
    state.compiled = True
    seconds = round(time.perf_counter() - start, 3)
    return {"event": "compiled", "step": state.step, "seconds": seconds, "message": f"{done}, in {duration(seconds)}"}


def _compile(rehearsal: Rehearsal, settings: CompileSettings, micro_batch_size: int, batch_size: int) -> str:
    """Compile the largest part of the unit that can be, and run it; return a description of the part."""
    unit = rehearsal.step.unit
    longest = rehearsal.sequence_length if settings.pads else None
    if settings.cuda_graphs:
        unit.compile_whole(longest=longest)
        # the first run of a graph warms it up, the second records it, from the third on it is replayed
        _run(rehearsal, micro_batch_size, batch_size, repeats=3)
        return "the whole step, as CUDA graphs"
    if compiles_as_one(rehearsal.device, unit.num_layers, settings):
        unit.compile_blocks(as_one=True)
        try:
            _run(rehearsal, micro_batch_size, batch_size)
            return f"all {unit.num_layers} blocks in one graph"
        except Exception as error:
            unit.undo_compilation()
            log.info("the blocks cannot be compiled in one graph: %s", summary_line(error))
    unit.compile_blocks(longest=longest)
    _run(rehearsal, micro_batch_size, batch_size)
    return "the model's blocks"


def _run(rehearsal: Rehearsal, micro_batch_size: int, batch_size: int, *, repeats: int = 1) -> None:
    """Rehearse.  Memory that runs out is no fault: the first step will run out of it too, and halve the micro-batch."""
    try:
        rehearsal(micro_batch_size, batch_size, repeats=repeats)
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def compiles_as_one(device: torch.device, num_layers: int, settings: CompileSettings) -> bool:
    """Return whether all blocks are compiled into one graph; not on a CPU, where that takes minutes."""
    may = device.type == "cuda" and not (settings.recomputes or settings.pads or settings.is_sharded)
    return may and num_layers <= MAX_LAYERS_AS_ONE


def summary_line(error: Exception) -> str:
    """The first line of an error's message, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def compiling_pays(device: torch.device, ideal_seconds: float, *, pads: bool = False) -> bool:
    """Return whether to compile a run whose matrix products would take ``ideal_seconds`` at the device's full rate.

    ``pads``: its rows are of different lengths.
    """
    least = PAYS_FROM_SECONDS_WITH_PADDING if pads else PAYS_FROM_SECONDS
    return device.type == "cuda" and ideal_seconds / USUAL_UTILISATION > least


def why_not_compile(device: torch.device) -> str | None:
    """Return the requirement of ``torch.compile`` that this machine lacks; None if it has all."""
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        return "torch.compile needs a C++ compiler on a CPU (g++)"
    if sys.version_info >= (3, 15):
        return "torch.compile does not know this Python yet"
    return None
