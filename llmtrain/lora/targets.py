"""Targets of adapters: the layers that ``lora.targets`` names.

A target is one of

* ``all-linear``: every linear layer of the blocks;
* ``embeddings``, ``head``, or the full name of a layer outside the blocks;
* a layer's name, or its end after a dot: ``qkv``, ``mlp.down``, ``blocks.0.attention.qkv``;
* the same with the published name of the layer: ``c_attn``, ``q_proj``, ``mlp.down_proj``, ``W_pack``;
* with any other character than letters, digits, ``_``, ``-`` and ``.``, a regular expression that ``re.search`` looks
  for in the full names of the blocks' linear layers, as ``optimizer.rules`` does in those of parameters.
"""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from llmtrain.base.checks import pattern
from llmtrain.model import LanguageModel

ALL_LINEAR, EMBEDDINGS, HEAD, EMBEDDING = "all-linear", "embeddings", "head", "token_embedding"

# Ends of our names to ends of the names in transformers, keyed by a layer that only this family has; the last is for
# all other families.
PUBLISHED = {
    "mlp.gate": {
        "attention.qkv": "self_attn.W_pack", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.projection": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj", EMBEDDING: "embed_tokens", HEAD: "lm_head",
    },
    "attention.qkv": {
        "attention.qkv": "attn.c_attn", "attention.projection": "attn.c_proj", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj", EMBEDDING: "wte", "position_embedding": "wpe", HEAD: "lm_head",
    },
}  # fmt: skip


def block_linears(model: LanguageModel) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by name."""
    named = model.blocks.named_modules(prefix="blocks")
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


def outer_layers(model: LanguageModel) -> list[str]:
    """The layers outside the blocks that can be targeted: embeddings, and a head that is not the embedding."""
    children = model.named_children()
    return [name for name, module in children if isinstance(module, nn.Embedding) or name == HEAD]


def exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def find_targets(model: LanguageModel, targets: Sequence[str]) -> list[str]:
    """Find the names of the layers that ``targets`` selects, in the model's order.

    Raises ValueError, with the valid names, for a target that selects none.
    """
    linears, outer = list(block_linears(model)), outer_layers(model)
    published = published_names([*linears, *outer])
    found: set[str] = set()
    for i, target in enumerate(targets):
        if target == HEAD and HEAD not in outer:
            raise ValueError(
                f"targets[{i}]={target}: this model's output layer is its embedding, which has no adapter of its own "
                "as a head; leave it out, or train the matrix itself: also_train=[token_embedding]"
            )
        if target == ALL_LINEAR:
            matching = linears
        elif target == EMBEDDINGS:
            matching = [EMBEDDING]
        elif re.fullmatch(r"[\w.-]+", target):
            matching = [name for name in (*linears, *outer) if is_end(target, name) or is_end(target, published[name])]
        else:
            pattern(f"targets[{i}]", target)
            matching = [name for name in linears if re.search(target, name)]
        if not matching:
            raise ValueError(f"targets[{i}]={target}: {explain(target, linears, outer, published)}")
        found.update(matching)
    return [name for name, _ in model.named_modules() if name in found]


def is_end(end: str, name: str) -> bool:
    """Return whether ``name`` is ``end``, or ends with it after a dot."""
    return name == end or name.endswith(f".{end}")


def published_names(names: Sequence[str]) -> dict[str, str]:
    """The name of each layer in transformers, or its end; "" for a layer without one."""
    families = (table for sign, table in PUBLISHED.items() if any(is_end(sign, name) for name in names))
    family = next(families, {})
    return {name: next((theirs for ours, theirs in family.items() if is_end(ours, name)), "") for name in names}


def explain(target: str, linears: Sequence[str], outer: Sequence[str], published: dict[str, str]) -> str:
    """Explain a target that selects no layer: the valid names, and the closest one."""
    ours = list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in linears))
    theirs = list(dict.fromkeys(published[name].rpartition(".")[2] for name in linears if published[name]))
    names = [ALL_LINEAR, *ours, EMBEDDINGS, *(name for name in outer if name != EMBEDDING)]
    known = [*names, *theirs, *(name.rpartition(".")[2] for name in ours)]
    near = difflib.get_close_matches(target, known, 1, 0.65)
    hint = f"; did you mean {near[0]}?" if near else ""
    also = f" (or, as published: {', '.join(theirs)})" if theirs else ""
    return f"names no layer of this model, which has {', '.join(names)}{also}{hint}"
