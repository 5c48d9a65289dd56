"""The cut of GPT-2."""

from typing import Any

from llmtrain.distributed.plans import Plan
from llmtrain.model.gpt import GPT


def plan(model: GPT) -> Plan:
    """Cut the matrix of queries, keys and values by heads in each of its three sections, the network by channels."""
    hidden = model.config.hidden_size

    def set_heads(rank: int, ranks: int) -> None:
        for block in model.blocks:
            attention: Any = block.attention
            attention.num_heads = model.config.num_heads // ranks

    return Plan(
        shared=("attention", "mlp"),
        by_outputs={"attention.qkv": (hidden,) * 3, "mlp.up": (4 * hidden,)},
        by_inputs=("attention.projection", "mlp.down"),
        stream_norms=("attention_norm", "mlp_norm"),
        head_norms=(),
        counts={"num_heads": model.config.num_heads},
        set_heads=set_heads,
    )
