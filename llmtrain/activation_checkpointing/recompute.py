"""A block that keeps its input alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Contexts = tuple[AbstractContextManager, AbstractContextManager]
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)


def recompute(block: nn.Module, eager: Callable[..., Tensor] = again, compiled: Callable[..., Tensor] = again) -> None:
    """Have backward call ``block`` again for what it needs, with the random numbers and the autocast of the first time.

    ``eager`` and ``compiled`` call it, the latter within ``torch.compile``: ``again``, or ``again`` with contexts that
    keep more.  The method is exchanged and no module put around the block, so names and hooks stay as they are.
    """
    forward = block.forward

    def checkpointed(x: Tensor, cache: object | None = None, *shared: object) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():  # nothing will be asked for again
            return forward(x, cache, *shared)
        return (compiled if torch.compiler.is_compiling() else eager)(forward, x, None, *shared)

    block.forward = checkpointed
