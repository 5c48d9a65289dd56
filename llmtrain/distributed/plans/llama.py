"""The cut of Llama and its relatives."""

from typing import Any

from llmtrain.distributed.plans import Plan
from llmtrain.model.layers.attention import alibi_slopes
from llmtrain.model.llama import Llama


def plan(model: Llama) -> Plan:
    """Cut attention by heads, a rank has the key heads of its query heads, and the network by channels."""
    config = model.config
    queries, keys = config.num_heads * config.size_of_head, config.num_kv_heads * config.size_of_head
    layers: dict[str, tuple[int, ...]] = {"attention.qkv": (queries, keys, keys)}
    if not config.fused_qkv:
        layers = {"attention.query": (queries,), "attention.key": (keys,), "attention.value": (keys,)}
    channels = (config.intermediate_size,)

    def set_heads(rank: int, ranks: int) -> None:
        heads = config.num_heads // ranks
        for block in model.blocks:
            attention: Any = block.attention
            attention.num_heads, attention.num_kv_heads = heads, config.num_kv_heads // ranks
        if model.rotary is None:  # ALiBi: a slope for each head
            slopes = alibi_slopes(config.num_heads)[rank * heads : (rank + 1) * heads]
            model.positions.value = slopes.to(model.positions.value.device)

    return Plan(
        shared=("attention", "mlp"),
        by_outputs=layers | {"mlp.gate": channels, "mlp.up": channels},
        by_inputs=("attention.projection", "mlp.down"),
        stream_norms=("attention_norm", "mlp_norm"),
        head_norms=("attention.query_norm", "attention.key_norm") if config.qk_norm else (),
        counts={
            "num_kv_heads": config.num_kv_heads, "num_heads": config.num_heads,
            "intermediate_size": config.intermediate_size,
        },
        set_heads=set_heads,
    )  # fmt: skip
