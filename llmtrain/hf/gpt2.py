"""GPT-2 in transformers' format: linear layers stored as (inputs, outputs), learned positions, a tied head."""

from typing import Any

from llmtrain.hf import HEAD, ModelFamily, TensorMap
from llmtrain.hf.config_json import ConfigJson
from llmtrain.model import ModelConfig
from llmtrain.model.gpt import GPTConfig, Initialisation

NORM_EPS = 1e-5  # of our LayerNorm


class GPT2Family(ModelFamily):
    """``model_type`` gpt2."""

    prefix = "transformer."
    embedding = "transformer.wte.weight"

    def read_config(self, config: ConfigJson) -> GPTConfig:
        hidden = config.count("n_embd", "hidden_size", default=768)
        ours = "the only supported value"
        config.expect("n_inner", None, 4 * hidden, default=None, why=f"must be 4 * n_embd = {4 * hidden}")
        config.expect(
            "activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new", why="must be gelu_new"
        )
        config.expect("layer_norm_epsilon", NORM_EPS, default=NORM_EPS, why=f"{NORM_EPS}: {ours}")
        config.expect("scale_attn_weights", True, default=True, why=f"true: {ours}")
        config.expect("scale_attn_by_inverse_layer_idx", False, default=False, why=f"false: {ours}")
        return GPTConfig(
            num_layers=config.count("n_layer", "num_hidden_layers", default=12),
            hidden_size=hidden,
            num_heads=config.count("n_head", "num_attention_heads", default=12),
            context_length=config.count("n_positions", "max_position_embeddings", default=1024),
            vocab_size=config.count("vocab_size", default=50257),
            dropout=0.0,
            qkv_bias=True,
            tie_embeddings=config.is_tied,
            logit_softcap=None,
            initialisation=Initialisation.gpt2,
        )

    def write_config(self, config: ModelConfig, vocab_size: int, *, has_qwen_tokenizer: bool = True) -> dict[str, Any]:
        assert isinstance(config, GPTConfig)
        if config.logit_softcap is not None:
            raise ValueError(f"model.logit_softcap={config.logit_softcap}: GPT-2 in transformers has none")
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": vocab_size,
            "n_positions": config.context_length,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": None,
            "activation_function": "gelu_new",
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "layer_norm_epsilon": NORM_EPS,
            "initializer_range": 0.02,
            "scale_attn_weights": True,
            "tie_word_embeddings": config.tie_embeddings,
        }

    def names(self, config: ModelConfig, model_type: str = "gpt2") -> list[TensorMap]:
        assert isinstance(config, GPTConfig)
        maps = [
            TensorMap(("token_embedding.weight",), (self.embedding,)),
            TensorMap(("position_embedding.weight",), ("transformer.wpe.weight",), may_be_longer=True),
        ]
        for layer in range(config.num_layers):
            ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
            maps += _both(f"{ours}.attention_norm", f"{theirs}.ln_1")
            maps += _both(f"{ours}.mlp_norm", f"{theirs}.ln_2")
            maps += _both(f"{ours}.attention.projection", f"{theirs}.attn.c_proj", transposed=True)
            maps += _both(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", transposed=True)
            maps += _both(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", transposed=True)
            weight, bias = _both(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", transposed=True)
            maps += [weight, bias if config.qkv_bias else TensorMap((), bias.theirs, zeros=(3 * config.hidden_size,))]
        maps += _both("final_norm", "transformer.ln_f")
        return maps if config.tie_embeddings else [*maps, TensorMap(("head.weight",), (HEAD,))]


def _both(ours: str, theirs: str, *, transposed: bool = False) -> list[TensorMap]:
    """Weight and bias of a layer."""
    return [
        TensorMap((f"{ours}.weight",), (f"{theirs}.weight",), transposed=transposed),
        TensorMap((f"{ours}.bias",), (f"{theirs}.bias",)),
    ]
