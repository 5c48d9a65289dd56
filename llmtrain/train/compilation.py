"""Compilation of the training unit: the decision, the requirements, and the work."""

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

# compile=auto: on a GPU a compiled step saves a quarter of the time or so, and compiling takes up to a minute; from ten
# minutes on it has paid more than once over.  On a CPU the step is as long with it (benchmarks/results): the matrix
# products and attention are the same kernels, and what it fuses is as fast in torch's own.
PAYS_FROM_SECONDS = 600.0
USUAL_UTILISATION = 0.4  # of the device's matrix products, in a step that is not compiled


@dataclass(frozen=True)
class CompileSettings:
    """The settings that decide about compilation."""

    setting: bool | str  # as ``runtime.compile``
    cuda_graphs: bool
    evaluates: bool  # the unit runs without gradients too
    ideal_seconds: float  # of the run's matrix products at the device's full rate: for ``auto``


def compile_unit(
    rehearsal: Rehearsal, settings: CompileSettings, state: TrainState, micro_batch_size: int
) -> dict[str, Any] | None:
    """Compile the unit of ``rehearsal`` as ``settings`` say; return the event that reports it, None for none.

    The decision is kept in ``state``: a resumed run computes as before.  The unit is compiled at once, and where that
    fails under ``auto`` the run continues without it.
    """
    unit, is_automatic = rehearsal.step.unit, settings.setting == "auto"
    if is_automatic and state.compiled is None:
        wanted = compiling_pays(rehearsal.device, settings.ideal_seconds)
    else:
        wanted = bool(state.compiled if is_automatic else settings.setting)
    state.compiled = False
    if not wanted:
        return None
    if reason := why_not_compile(rehearsal.device):
        return {"event": "not_compiled", "step": state.step, "message": f"{reason}; training is slower without"}
    start = time.perf_counter()
    prepare_compiler_cache()
    if settings.cuda_graphs:
        unit.compile_whole()
    else:
        unit.compile_blocks()
    rehearsal.step.precision.is_compiled = True
    try:
        rehearsal(micro_batch_size, evaluates=settings.evaluates)
    except Exception as error:  # the compilers below have errors of many classes, with no common one
        if is_out_of_memory(error):
            pass  # the first step will run out of memory as well, and halve the micro-batch
        elif is_automatic:
            unit.undo_compilation()
            rehearsal.step.precision.is_compiled = False
            message = f"torch.compile failed ({summary_line(error)}); training is slower without"
            return {"event": "not_compiled", "step": state.step, "message": message}
        else:
            error.add_note("runtime.compile=false trains without torch.compile")
            raise
    state.compiled = True
    seconds = round(time.perf_counter() - start, 3)
    return {"event": "compiled", "step": state.step, "seconds": seconds,
            "message": f"the model's blocks, in {duration(seconds)}"}  # fmt: skip


def summary_line(error: Exception) -> str:
    """The first line of an error's message, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def compiling_pays(device: torch.device, ideal_seconds: float) -> bool:
    """Return whether to compile a run whose matrix products would take ``ideal_seconds`` at the device's full rate."""
    return device.type == "cuda" and ideal_seconds / USUAL_UTILISATION > PAYS_FROM_SECONDS


def why_not_compile(device: torch.device) -> str | None:
    """Return the requirement of ``torch.compile`` that this machine lacks; None if it has all."""
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        return "torch.compile needs a C++ compiler on a CPU (g++)"
    if sys.version_info >= (3, 15):
        return "torch.compile does not know this Python yet"
    return None
