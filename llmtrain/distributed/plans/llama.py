"""The cut of Llama and its relatives."""

from llmtrain.distributed.plans import Plan
from llmtrain.distributed.tensor_group import TensorGroup
from llmtrain.model.llama import Llama


def plan(model: Llama) -> Plan:
    """Cut attention by heads, a rank has the key heads of its query heads, and the network by channels."""
    config = model.config
    queries, keys, values = model.blocks[0].attention.sizes
    if config.fused_qkv:
        attention = {"attention.qkv": (queries, keys, values)}
    else:
        attention = {"attention.query": (queries,), "attention.key": (keys,), "attention.value": (values,)}
    channels = (config.intermediate_size,)

    def keep_heads(ranks: TensorGroup) -> None:
        heads = config.num_heads // ranks.size
        for block in model.blocks:
            block.attention.num_heads, block.attention.num_kv_heads = heads, config.num_kv_heads // ranks.size
        if model.rotary is None:  # ALiBi: a slope for each head
            model.positions.value = model.positions.value[ranks.rank * heads : (ranks.rank + 1) * heads].clone()

    return Plan(
        shared=("attention", "mlp"),
        by_outputs=attention | {"mlp.gate": channels, "mlp.up": channels},
        by_inputs=("attention.projection", "mlp.down"),
        stream_norms=("attention_norm", "mlp_norm"),
        head_norms=("attention.query_norm", "attention.key_norm") if config.qk_norm else (),
        counts={
            "num_kv_heads": config.num_kv_heads, "num_heads": config.num_heads,
            "intermediate_size": config.intermediate_size,
        },
        keep_heads=keep_heads,
    )  # fmt: skip
