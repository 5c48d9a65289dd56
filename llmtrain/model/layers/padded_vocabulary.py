"""Vocabulary padding: rows added inside the model, invisible outside."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 64  # matrix kernels run markedly faster on output sizes that are multiples of 64


def padded_size(vocab_size: int) -> int:
    """``vocab_size`` rounded up to a multiple of 64."""
    return -(-vocab_size // MULTIPLE) * MULTIPLE


def logit_bias(vocab_size: int, device: torch.device) -> Tensor | None:
    """A bias ``(padded,)`` for the output layer: 0 for tokens, ``-inf`` for padding; None without padding.

    As the bias of the matrix product it needs no pass of its own over the logits.
    """
    padding = padded_size(vocab_size) - vocab_size
    if padding == 0:
        return None
    bias = torch.zeros(vocab_size + padding, device=device)
    bias[vocab_size:] = -torch.inf
    return bias


def hide_padding(module: nn.Module, names: tuple[str, ...], vocab_size: int) -> None:
    """Hide the padding of the parameters ``names``: ``state_dict()`` removes it, loading adds it as zeros.

    ``module.padded_weights`` names them, for those who take the parameters from elsewhere.  A parameter that holds a
    part of the vocabulary's rows alone is left as it is.
    """
    module.padded_weights = names  # type: ignore[assignment]
    padded = padded_size(vocab_size)

    def is_whole(name: str) -> bool:
        parameter = dict(module.named_parameters(remove_duplicate=False)).get(name)
        return parameter is not None and len(parameter) == padded

    def cut(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        for name in names:
            if prefix + name in state and is_whole(name):
                state[prefix + name] = state[prefix + name][:vocab_size]

    def pad(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
        for name in names:
            weight = state.get(prefix + name)
            if weight is not None and weight.shape[0] == vocab_size and is_whole(name):
                state[prefix + name] = F.pad(weight, (0, 0, 0, padded - vocab_size))

    module.register_state_dict_post_hook(cut)
    module.register_load_state_dict_pre_hook(pad)
