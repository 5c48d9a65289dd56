"""Recomputation of a block in the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

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
        return (compiled if torch.compiler.is_compiling() else eager)(forward, x, None, *shared)

    block.forward = checkpointed
