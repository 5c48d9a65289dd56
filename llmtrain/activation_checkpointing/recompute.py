"""Recomputation of a block in the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

Contexts = tuple[AbstractContextManager, AbstractContextManager]
checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=True)


def recompute(
    block: nn.Module, eager: Callable[..., Tensor] = checkpoint, compiled: Callable[..., Tensor] = checkpoint
) -> None:
    """Make backward compute ``block`` again, with the random numbers and the autocast state of the first time.

    ``eager`` and ``compiled`` call the block, the latter within ``torch.compile``: ``checkpoint``, or ``checkpoint``
    with contexts that keep more.  Only the method ``forward`` is replaced, so names and hooks of modules stay the same.
    """
    forward = block.forward

    def checkpointed(x: Tensor, cache: object | None = None, *shared: object) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():  # there is no backward pass
            return forward(x, cache, *shared)
        if torch.compiler.is_compiling():
            return compiled(forward, x, None, *shared)
        return eager(within_present_modes(forward), x, None, *shared)

    block.forward = checkpointed


def within_present_modes(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``forward`` for a call in the backward pass, where torch's function modes of now are no longer in force.

    A plan for a GPU has one, and what is computed again must keep as much as it did the first time.
    """
    modes = _get_current_function_mode_stack()
    if not modes:
        return forward

    def again(*arguments: object) -> Tensor:
        with ExitStack() as stack:
            if not _get_current_function_mode_stack():
                for mode in modes:
                    stack.enter_context(mode)
            return forward(*arguments)

    return again
