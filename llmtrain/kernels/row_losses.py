"""Cross-entropies of rows of logits, whose place their gradient takes.

There are two forms of the same arithmetic.  The plain one is a dozen of torch's operations on as many rows as a
second-level cache holds, or on a GPU without a compiler on some hundred megabytes.  The other one is for a GPU: torch's
compiler makes one kernel of it, which reads the logits twice, the second time mostly from the cache, writes the
gradient once, and makes no tensor of the logits' size.  For that the class of a row is found by comparison, since the
compiler does not fuse what reads or writes by index.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmtrain.base.constants import IGNORE
from llmtrain.base.trusted_files import prepare_compiler_cache

BLOCK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}  # of the plain form's logits in fp32: on a CPU what a cache holds
MAX_VARIANTS = 64  # of the compiled form: one for each size of vocabulary and kind of loss, for any number of rows
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Additions to the plain cross-entropy."""

    softcap: float | None = None  # logits are cap * tanh(logits / cap)
    z_loss: float = 0.0  # weight of the squared log of the softmax denominator: PaLM, section 5


@dataclass(frozen=True)
class RowWork:
    """The work on rows of logits, and the way it is done."""

    options: Options
    differentiate: bool  # write the gradient over the logits
    factor: float  # of the gradient
    device: str  # type of the device whose form is taken
    is_compiled: bool  # on a GPU: one kernel
    is_traced: bool  # for a plan: only memory matters, and only the first of the blocks is computed


class VocabularyShare(ABC):
    """The loss where every process holds some rows of the vocabulary, and all compute the loss of the same tokens."""

    largest: int  # number of rows that a process holds at most

    @abstractmethod
    def row_losses(self, logits: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork) -> Tensor:
        """The same as :func:`row_losses`, over all rows; ``logits`` and ``bias`` are those of the rows held here.

        The result is the same in every process.
        """

    @abstractmethod
    def sum(self, gradient: Tensor) -> None:
        """Add to ``gradient``, from the rows held here, those of the other processes, in place."""


def row_losses(logits: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork) -> Tensor:
    """Compute the cross-entropy of each row of ``logits`` ``(rows, vocabulary)``; fp32 (float64 for float64).

    ``bias``: ``(vocabulary,)``, added after the soft-cap; ``targets``: ``(rows,)``.  Rows without a target have any
    loss, and on a CPU any gradient; on a GPU their gradient is 0.
    """
    if work.is_compiled:
        if work.is_traced:
            return torch.empty(len(logits), dtype=exact_dtype(logits.dtype), device=logits.device)
        losses = compiled_form()(logits, bias, targets, work)
        if losses is not None:
            return losses
    return _losses_in_blocks(logits, bias, targets, work)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and of everything between logits and gradient: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


# --- for a GPU ------------------------------------------------------------------------------------------------------


def losses_at_once(logits: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork) -> Tensor:
    """The form that is compiled.  Uncompiled it takes several times the memory of the logits."""
    options, exact = work.options, exact_dtype(logits.dtype)
    x = raw = logits.to(exact)
    if options.softcap is not None:
        saturation = torch.tanh(raw / options.softcap)
        x = options.softcap * saturation
    if bias is not None:
        x = x + bias
    classes = targets.unsqueeze(1).to(torch.int32)
    is_class = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device) == classes
    highest = x.amax(1, keepdim=True)
    log_sum = (x - highest).exp().sum(1, keepdim=True).log()
    of_target = torch.where(is_class, x, 0.0).sum(1, keepdim=True)
    if work.differentiate:
        gradient = (x - highest - log_sum).exp()
        if options.z_loss:
            gradient = gradient * (1 + 2 * options.z_loss * (highest + log_sum))
        gradient = torch.where(is_class, gradient - 1, gradient)
        if options.softcap is not None:
            gradient = gradient * (1 - saturation.square())
        logits.copy_(torch.where(classes == IGNORE, 0.0, gradient * work.factor))
    return (log_sum - (of_target - highest)).squeeze(1)


class CompiledForm:
    """The form for a GPU, compiled at the first call; where that fails, the reason."""

    def __init__(self) -> None:
        self.function: Callable[..., Tensor] | None = None
        self.failure = ""

    def __call__(self, logits: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork) -> Tensor | None:
        """Return the losses as :func:`row_losses` does; None where they cannot be computed so."""
        if self.failure or len(logits) < 2:  # a single row would be another variant
            return None
        try:
            if self.function is None:
                self.function = compile_for_any_rows()
            for tensor in (logits, targets):
                torch._dynamo.mark_dynamic(tensor, 0)
            return self.function(logits, bias, targets, work)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # the compilers below have errors of many classes, with no common one
            lines = str(error).strip().splitlines()
            self.failure = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            log.warning("the loss is computed without its compiled kernel, which takes longer (%s)", self.failure)
            return None


@cache
def compiled_form() -> CompiledForm:
    """The compiled form of this process."""
    return CompiledForm()


def compile_for_any_rows() -> Callable[..., Tensor]:
    """Compile :func:`losses_at_once`; each call marks the number of rows as one that varies."""
    prepare_compiler_cache()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
    # A row is never split over several kernels, however few there are at first, and no variants are timed: the results
    # are the same in every process, and there is no copy of the logits to time them on.
    return torch.compile(_losses_or_blocks, fullgraph=True, options={"split_reductions": False, "deterministic": True})


def _losses_or_blocks(logits: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork) -> Tensor:
    """The compiled form, unless the compiler is switched off for a while: torch then calls this function itself."""
    form = losses_at_once if torch.compiler.is_compiling() else _losses_in_blocks
    return form(logits, bias, targets, work)


# --- in torch's operations ------------------------------------------------------------------------------------------


def _losses_in_blocks(logits: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork) -> Tensor:
    exact = exact_dtype(logits.dtype)
    rows = max(BLOCK_BYTES.get(work.device, BLOCK_BYTES["cuda"]) // (exact.itemsize * logits.shape[1]), 1)
    parts = list(zip(logits.split(rows), targets.split(rows), strict=True))
    done = parts[:1] if work.is_traced else parts  # the others come and go in the same way
    losses = [_losses_of_block(block, bias, of_block, work) for block, of_block in done]
    losses += [torch.empty(len(block), dtype=exact, device=block.device) for block, _ in parts[len(done) :]]
    return torch.cat(losses)


def _losses_of_block(raw: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork) -> Tensor:
    options, exact = work.options, exact_dtype(raw.dtype)
    is_target = targets != IGNORE
    classes = torch.where(is_target, targets, 0)[:, None]
    logits, slope = raw, None
    if options.softcap is not None:
        saturation = torch.tanh(raw.to(exact) / options.softcap)
        logits, slope = options.softcap * saturation, 1 - saturation.square()
    if bias is not None:
        logits += bias
    log_probabilities = torch.log_softmax(logits, -1, dtype=exact)
    of_target = log_probabilities.gather(1, classes)
    if work.differentiate:
        log_sum = logits.gather(1, classes) - of_target
        gradient = log_probabilities.exp_()
        if options.z_loss:
            gradient *= 1 + 2 * options.z_loss * log_sum
        gradient.scatter_(1, classes, gradient.gather(1, classes) - 1)
        if slope is not None:
            gradient *= slope
        if work.device != "cpu":
            torch.mul(gradient, (is_target * work.factor)[:, None], out=raw)
        elif work.factor == 1.0:
            raw.copy_(gradient)
        else:
            torch.mul(gradient, work.factor, out=raw)
    return -of_target[:, 0]
