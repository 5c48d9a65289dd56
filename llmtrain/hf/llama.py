"""Llama, Mistral, Qwen 2 and Qwen 3 in transformers' format (SmolLM is a Llama): one layout, different switches."""

from typing import Any

from llmtrain.hf import HEAD, ModelFamily, TensorMap
from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.rope import read_rope, write_rope
from llmtrain.model import ModelConfig
from llmtrain.model.layers.rotary import Scaling
from llmtrain.model.llama import LlamaConfig, Position

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
KEY_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # without num_key_value_heads in config.json
HEAD_SIZES = {"qwen3": 128}  # without head_dim
WINDOW, FULL_LAYERS = 4096, 28  # without sliding_window, max_window_layers


class LlamaFamily(ModelFamily):
    """``model_type`` llama, mistral, qwen2 and qwen3."""

    prefix = "model."
    embedding = "model.embed_tokens.weight"

    def read_config(self, config: ConfigJson) -> LlamaConfig:
        kind = config.text("model_type")
        config.expect("hidden_act", "silu", "swish", default="silu", why="must be silu: the MLP is a SwiGLU here")
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        layers, positions = config.count("num_hidden_layers"), config.count("max_position_embeddings")
        head_size = config.count("head_dim", default=HEAD_SIZES.get(kind, max(hidden // heads, 1)))
        window, from_layer = read_window(config, kind, layers)
        bias = config.flag("attention_bias", False) if kind in ("llama", "qwen3") else False
        key_heads = KEY_HEADS.get(kind, heads) if "num_key_value_heads" not in config.values else heads
        return LlamaConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=config.count("num_key_value_heads", default=key_heads),
            head_size=None if head_size * heads == hidden else head_size,
            intermediate_size=config.count("intermediate_size"),
            context_length=positions,
            vocab_size=config.count("vocab_size"),
            position=Position.rope,
            **read_rope(config, positions),
            norm_eps=config.number("rms_norm_eps", 1e-6),
            qkv_bias=bias or kind == "qwen2",
            output_bias=bias,
            mlp_bias=config.flag("mlp_bias", False) if kind == "llama" else False,
            qk_norm=kind == "qwen3",
            fused_qkv=False,
            sliding_window=window,
            sliding_window_from_layer=from_layer,
            tie_embeddings=config.is_tied,
            normalised_head=False,
            dropout=0.0,
            logit_softcap=None,
            initial_std=config.number("initializer_range", 0.02),
        )

    def write_config(self, config: ModelConfig, vocab_size: int, *, has_qwen_tokenizer: bool = True) -> dict[str, Any]:
        assert isinstance(config, LlamaConfig)
        kind = model_type_of(config, has_qwen_tokenizer=has_qwen_tokenizer)
        values: dict[str, Any] = {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": kind,
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.size_of_head,
            "hidden_act": "silu",
            **write_rope(config),
            "initializer_range": config.initial_std,
            "rms_norm_eps": config.norm_eps,
            "attention_dropout": config.dropout,
            "tie_word_embeddings": config.tie_embeddings,
        }
        if kind == "llama":
            values |= {"attention_bias": has_bias(config), "mlp_bias": config.mlp_bias}
        if kind == "qwen3":
            values |= {"attention_bias": has_bias(config)}
        if kind == "mistral":
            values |= {"sliding_window": config.sliding_window}
        if kind in ("qwen2", "qwen3"):
            values |= {
                "use_sliding_window": config.sliding_window is not None,
                "sliding_window": config.sliding_window,
                "max_window_layers": config.num_layers if config.sliding_window is None
                else config.sliding_window_from_layer,
            }  # fmt: skip
        return values

    def names(self, config: ModelConfig, model_type: str) -> list[TensorMap]:
        assert isinstance(config, LlamaConfig)
        maps = [TensorMap(("token_embedding.weight",), (self.embedding,))]
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        rows = tuple(config.size_of_head * count for count in heads)
        has_both = model_type in ("llama", "qwen3") and has_bias(config)
        for layer in range(config.num_layers):
            ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            attention = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
            maps += self.attention(config, f"{ours}.attention", attention, rows, has_both or model_type == "qwen2")
            maps += layer_maps(
                (f"{ours}.attention.projection",), (f"{theirs}.self_attn.o_proj",), (config.hidden_size,),
                config.output_bias, has_both,
            )  # fmt: skip
            if config.qk_norm:
                maps += [
                    TensorMap((f"{ours}.attention.{part}_norm.weight",), (f"{theirs}.self_attn.{part[0]}_norm.weight",))
                    for part in ("query", "key")
                ]
            maps += rest_of_layer(config, ours, theirs)
        maps.append(TensorMap(("final_norm.weight",), ("model.norm.weight",)))
        return maps if config.tie_embeddings else [*maps, TensorMap(("head.weight",), (HEAD,))]

    def attention(
        self, config: LlamaConfig, ours: str, theirs: tuple[str, ...], rows: tuple[int, ...], has_bias: bool
    ) -> list[TensorMap]:
        """Queries, keys and values: three layers there, one or three here."""
        if config.fused_qkv:
            return layer_maps((f"{ours}.qkv",), theirs, rows, config.qkv_bias, has_bias)
        return [
            pair
            for name, their, count in zip(("query", "key", "value"), theirs, rows, strict=True)
            for pair in layer_maps((f"{ours}.{name}",), (their,), (count,), config.qkv_bias, has_bias)
        ]


def layer_maps(
    ours: tuple[str, ...], theirs: tuple[str, ...], rows: tuple[int, ...], our_bias: bool, their_bias: bool
) -> list[TensorMap]:
    """Weights and biases of linear layers; ``rows``: outputs of each of theirs."""
    several = rows if len(theirs) > 1 else ()
    biases = tuple(f"{name}.bias" for name in theirs)
    maps = [TensorMap(tuple(f"{name}.weight" for name in ours), tuple(f"{name}.weight" for name in theirs), several)]
    if our_bias:
        maps.append(TensorMap(tuple(f"{name}.bias" for name in ours), biases, several))
    elif their_bias:
        maps += [TensorMap((), (name,), zeros=(count,)) for name, count in zip(biases, rows, strict=True)]
    return maps


def rest_of_layer(config: LlamaConfig, ours: str, theirs: str) -> list[TensorMap]:
    """Norms and MLP."""
    maps = [
        TensorMap((f"{ours}.attention_norm.weight",), (f"{theirs}.input_layernorm.weight",)),
        TensorMap((f"{ours}.mlp_norm.weight",), (f"{theirs}.post_attention_layernorm.weight",)),
    ]
    for name in ("gate", "up", "down"):
        maps += layer_maps((f"{ours}.mlp.{name}",), (f"{theirs}.mlp.{name}_proj",), (), config.mlp_bias, False)
    return maps


def has_bias(config: LlamaConfig) -> bool:
    """True if a Llama or Qwen 3 needs ``attention_bias``, which applies to all four layers of the attention."""
    return config.qkv_bias or config.output_bias


def read_window(config: ConfigJson, kind: str, layers: int) -> tuple[int | None, int]:
    """The sliding window (None: none), and the first layer that has one."""
    if kind == "llama":
        return None, 0
    if kind == "mistral":
        window = config.get("sliding_window", WINDOW)
        return (None if window is None else config.count("sliding_window", default=WINDOW)), 0
    first = config.get("max_window_layers", FULL_LAYERS)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        config.refuse("max_window_layers", "a number of layers is needed")
    is_used = config.flag("use_sliding_window", False) and config.get("sliding_window", WINDOW) is not None
    kinds = config.get("layer_types")
    if kinds is not None:
        first = next((i for i, kind in enumerate(kinds) if kind != "full_attention"), layers)
        plain = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
        if kinds != plain or (first < layers and not is_used):
            config.refuse("layer_types", "must be full_attention up to some layer and sliding_attention from there "
                          "on, with use_sliding_window and a sliding_window")  # fmt: skip
    if not is_used or first >= layers:
        config.get("sliding_window")
        return None, 0
    return config.count("sliding_window", default=WINDOW), first


def model_type_of(config: LlamaConfig, *, has_qwen_tokenizer: bool = True) -> str:
    """The ``model_type`` that computes the same as ``config``; a bias missing here is written as zeros.

    With another tokenizer than Qwen's a Qwen 2 is written as a Llama with biases.  Raises ValueError, naming the key,
    if there is none.
    """
    check_common(config)
    windowed = config.sliding_window is not None
    if config.mlp_bias and (config.qk_norm or windowed):
        raise ValueError(
            "model.mlp_bias=true: transformers has no such model with "
            f"{'model.qk_norm' if config.qk_norm else 'model.sliding_window'}"
        )
    if config.qk_norm:
        return "qwen3"
    if windowed and config.output_bias:
        raise ValueError("model.output_bias=true: transformers has no such model with model.sliding_window")
    if config.mlp_bias or config.output_bias:
        return "llama"
    if windowed and (config.qkv_bias or config.sliding_window_from_layer) and not has_qwen_tokenizer:
        key = "qkv_bias=true" if config.qkv_bias else f"sliding_window_from_layer={config.sliding_window_from_layer}"
        raise ValueError(
            f"model.{key}: with model.sliding_window transformers has only Qwen 2, and reads any tokenizer beside it "
            "as Qwen's; take the tokenizer of a Qwen, or model.sliding_window=null"
        )
    if config.qkv_bias or (windowed and config.sliding_window_from_layer):
        return "qwen2" if has_qwen_tokenizer else "llama"
    return "mistral" if windowed else "llama"


def check_common(config: LlamaConfig) -> None:
    """Raise ValueError for settings that no model of the family supports."""
    if config.logit_softcap is not None:
        raise ValueError(f"model.logit_softcap={config.logit_softcap}: this family of transformers has none")
    if config.rope_scaling is Scaling.dynamic and config.rope_original_context_length is None:
        raise ValueError("model.rope_original_context_length=null: rope_scaling=dynamic needs it")
