"""Baichuan and Baichuan 2: names and config keys.  The code that comes with their checkpoints is not needed.

7B and 13B are two architectures under one ``model_type``, and ``config.json`` does not say which: the published ones
differ in ``hidden_size`` (4096: rotary positions; 5120: ALiBi), others in ``max_position_embeddings``, a key that only
the configuration of the 7B has.  Baichuan 2 normalises the rows of its head; the first Baichuan, with its 64,000
tokens, does not.
"""

from typing import Any

from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.llama import LlamaFamily, check_common, layer_maps
from llmtrain.hf.rope import read_rope
from llmtrain.model import ModelConfig
from llmtrain.model.layers.rotary import Scaling
from llmtrain.model.llama import LlamaConfig, Position

ROTARY_SIZE, ALIBI_SIZE = 4096, 5120  # hidden sizes of 7B and 13B
FIRST_VOCABULARY = 64000  # of the first Baichuan
THETA = 10000.0


class BaichuanFamily(LlamaFamily):
    """``model_type`` baichuan."""

    def read_config(self, config: ConfigJson) -> LlamaConfig:
        config.expect("hidden_act", "silu", "swish", default="silu", why="must be silu: the MLP is a SwiGLU here")
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        vocab_size = config.count("vocab_size")
        config.expect("num_key_value_heads", None, heads, default=None, why="W_pack has as many heads of each kind")
        is_rotary = has_rotary(hidden, config.get("max_position_embeddings") is not None)
        positions = config.count(*(("max_position_embeddings", "model_max_length") if is_rotary else
                                   ("model_max_length", "max_position_embeddings")))  # fmt: skip
        rope: dict[str, Any] = dict.fromkeys(
            ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context_length")
        )
        rope |= {"rope_theta": None, "rope_scaling": Scaling.none}
        if is_rotary:
            rope = read_rope(config, positions)
            if rope["rope_scaling"] is not Scaling.none or rope["rope_theta"] != THETA:
                config.refuse("rope_scaling" if config.get("rope_scaling") else "rope_theta", "Baichuan has none")
        return LlamaConfig(
            num_layers=config.count("num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_size=None,
            intermediate_size=config.count("intermediate_size"),
            context_length=positions,
            vocab_size=vocab_size,
            position=Position.rope if is_rotary else Position.alibi,
            **rope,
            norm_eps=config.number("rms_norm_eps", 1e-6),
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            qk_norm=False,
            fused_qkv=True,
            sliding_window=None,
            sliding_window_from_layer=0,
            tie_embeddings=config.is_tied,
            normalised_head=vocab_size != FIRST_VOCABULARY,
            dropout=0.0,
            logit_softcap=None,
            initial_std=config.number("initializer_range", 0.02),
        )

    def write_config(self, config: ModelConfig, vocab_size: int, *, has_qwen_tokenizer: bool = True) -> dict[str, Any]:
        assert isinstance(config, LlamaConfig)
        self._check(config, vocab_size)
        is_rotary = config.position is Position.rope
        values = {
            "architectures": ["BaichuanForCausalLM"],
            "model_type": "baichuan",
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "hidden_act": "silu",
            "model_max_length": config.context_length,
            "initializer_range": config.initial_std,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
        }
        return values | {"max_position_embeddings": config.context_length} if is_rotary else values

    def _check(self, config: LlamaConfig, vocab_size: int) -> None:
        """Raise ValueError for a model that Baichuan's code does not compute, or would take for another."""
        check_common(config)
        is_rotary = config.position is Position.rope
        plain: dict[str, Any] = {
            "num_kv_heads": config.num_heads, "qkv_bias": False, "output_bias": False, "mlp_bias": False,
            "qk_norm": False, "sliding_window": None, "rope_scaling": Scaling.none,
            "rope_theta": THETA if is_rotary else None, "normalised_head": vocab_size != FIRST_VOCABULARY,
        }  # fmt: skip
        for key, value in plain.items():
            if (found := getattr(config, key)) != value:
                why = "normalised_head=true" if config.normalised_head else "position=alibi"
                raise ValueError(
                    f"model.{key}={getattr(found, 'name', found)}: with {why} a model is written as a Baichuan, which "
                    f"has {getattr(value, 'name', value)}"
                )
        if config.size_of_head * config.num_heads != config.hidden_size:
            raise ValueError(f"model.head_size={config.head_size}: Baichuan's is hidden_size / num_heads")
        if has_rotary(config.hidden_size, is_rotary) != is_rotary:
            raise ValueError(
                f"model.position={config.position.name}: a Baichuan of hidden_size={config.hidden_size} has the other"
            )

    def attention(
        self, config: LlamaConfig, ours: str, theirs: tuple[str, ...], rows: tuple[int, ...], has_bias: bool
    ) -> list[Any]:
        """Queries, keys and values: ``W_pack`` there, one layer or three here."""
        pack = theirs[0].replace("q_proj", "W_pack")
        layers = ("qkv",) if config.fused_qkv else ("query", "key", "value")
        return layer_maps(tuple(f"{ours}.{name}" for name in layers), (pack,), (), config.qkv_bias, has_bias)


def has_rotary(hidden_size: int, names_positions: bool) -> bool:
    """True for a Baichuan with rotary positions, False for one with ALiBi."""
    return names_positions if hidden_size not in (ROTARY_SIZE, ALIBI_SIZE) else hidden_size == ROTARY_SIZE
