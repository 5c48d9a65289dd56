"""Merging of adapters into the weights."""

import dataclasses
from typing import Any

import torch
from torch import nn

from llmtrain.lora.layers import Adapter, FrozenLinear, LoraEmbedding, LoraHead
from llmtrain.lora.targets import EMBEDDING, HEAD, exchange
from llmtrain.model import LanguageModel


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The layers of ``model`` that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


@torch.no_grad()
def merge(model: LanguageModel, *, has_output: bool = True) -> None:
    """Add each adapter to the weight that it belongs to, in float64, and leave plain layers.

    The weights keep their dtype; those that were packed are fp32 afterwards: rounded to fewer bits again they would
    lose what was learnt.  An output layer that is the embedding gets a matrix of its own where the embedding has an
    adapter, which is for the input alone.  Without ``has_output`` the output layer takes no part.  Raises
    ValueError where the model cannot have one.
    """
    if isinstance(model.get_submodule(EMBEDDING), LoraEmbedding) and not hasattr(model, HEAD) and has_output:
        _untie(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraEmbedding):
            plain: nn.Module = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
        elif isinstance(module, FrozenLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.register_parameter("bias", module.bias)
        elif isinstance(module, LoraHead):
            plain = nn.Linear(module.in_features, len(module.own_weight), bias=False, device="meta")
        else:
            continue
        own = module.own_weight
        weight = module.adapted(torch.float64).to(own.dtype) if isinstance(module, Adapter) else own
        plain.weight = nn.Parameter(weight, requires_grad=False)
        exchange(model, name, plain.train(module.training))


def _untie(model: LanguageModel) -> None:
    config: Any = model.config
    if not hasattr(config, "tie_embeddings"):
        raise ValueError(
            "lora.targets=[embeddings]: cannot be merged: this model's output layer is its embedding, and the adapter "
            "is for the input alone; keep it apart (format=peft)"
        )
    weight = model.head_weight
    model.head = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    model.head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    model.config = dataclasses.replace(config, tie_embeddings=False)
