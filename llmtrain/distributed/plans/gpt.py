"""The cut of GPT-2."""

from llmtrain.distributed.plans import Plan
from llmtrain.distributed.tensor_group import TensorGroup
from llmtrain.model.gpt import GPT


def plan(model: GPT) -> Plan:
    """Cut the matrix of queries, keys and values by heads in each of its three sections, the network by channels."""
    hidden = model.config.hidden_size

    def keep_heads(ranks: TensorGroup) -> None:
        for block in model.blocks:
            block.attention.num_heads = model.config.num_heads // ranks.size

    return Plan(
        shared=("attention", "mlp"),
        by_outputs={"attention.qkv": (hidden,) * 3, "mlp.up": (4 * hidden,)},
        by_inputs=("attention.projection", "mlp.down"),
        stream_norms=("attention_norm", "mlp_norm"),
        head_norms=(),
        counts={"num_heads": model.config.num_heads},
        keep_heads=keep_heads,
    )
