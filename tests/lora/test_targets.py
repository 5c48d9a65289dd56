"""Targets of adapters: the layers that they select."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmtrain.config.build import build
from llmtrain.lora.targets import find_targets
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.model.layers.rotary import Scaling
from llmtrain.model.llama import LlamaConfig, Position
from tests.helpers.adapted import make, seeded
from tests.helpers.units import as_unit

GPT = GPTConfig(
    num_layers=2, hidden_size=16, num_heads=2, context_length=8, vocab_size=None, dropout=0.0, qkv_bias=True,
    tie_embeddings=True, logit_softcap=None, initialisation=Initialisation.gpt2,
)  # fmt: skip
LLAMA = LlamaConfig(
    num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=2, head_size=None, intermediate_size=24, context_length=8,
    vocab_size=None, position=Position.rope, rope_theta=10000.0, rope_scaling=Scaling.none, rope_factor=None,
    rope_low_freq_factor=None, rope_high_freq_factor=None, rope_original_context_length=None, norm_eps=1e-5,
    qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, fused_qkv=False, sliding_window=None,
    sliding_window_from_layer=0, tie_embeddings=False, normalised_head=False, dropout=0.0, logit_softcap=None,
    initial_std=0.02,
)  # fmt: skip
BAICHUAN = replace(LLAMA, fused_qkv=True, normalised_head=True)
MODELS = {"gpt2": GPT, "untied": replace(GPT, tie_embeddings=False), "llama": LLAMA, "baichuan": BAICHUAN}


def model(name: str) -> LanguageModel:
    with torch.device("meta"):
        return MODELS[name].build(30)


def of_blocks(*ends: str) -> list[str]:
    return [f"blocks.{layer}.{end}" for layer in range(2) for end in ends]


GPT_LINEARS = ("attention.qkv", "attention.projection", "mlp.up", "mlp.down")


@pytest.mark.parametrize(
    ("name", "targets", "found"),
    [
        ("gpt2", ["all-linear"], of_blocks(*GPT_LINEARS)),
        ("untied", ["all-linear"], of_blocks(*GPT_LINEARS)),  # not the head
        ("llama", ["all-linear"], of_blocks("attention.query", "attention.key", "attention.value",
                                            "attention.projection", "mlp.gate", "mlp.up", "mlp.down")),
        ("gpt2", ["qkv"], of_blocks("attention.qkv")),
        ("gpt2", ["mlp.down", "qkv"], of_blocks("attention.qkv", "mlp.down")),
        ("gpt2", ["blocks.1.mlp.up"], ["blocks.1.mlp.up"]),
        ("gpt2", [r"blocks\.0\..*(qkv|up)"], ["blocks.0.attention.qkv", "blocks.0.mlp.up"]),
        ("gpt2", ["attention.*"], of_blocks("attention.qkv", "attention.projection")),
        ("gpt2", ["embeddings"], ["token_embedding"]),
        ("gpt2", ["position_embedding"], ["position_embedding"]),
        ("untied", ["head", "embeddings"], ["token_embedding", "head"]),
        ("gpt2", ["c_attn", "c_fc"], of_blocks("attention.qkv", "mlp.up")),
        ("gpt2", ["c_proj"], of_blocks("attention.projection", "mlp.down")),  # both have this name there
        ("gpt2", ["attn.c_proj"], of_blocks("attention.projection")),
        ("untied", ["lm_head", "wte"], ["token_embedding", "head"]),
        ("llama", ["q_proj", "v_proj"], of_blocks("attention.query", "attention.value")),
        ("llama", ["self_attn.o_proj", "down_proj"], of_blocks("attention.projection", "mlp.down")),
        ("baichuan", ["W_pack"], of_blocks("attention.qkv")),
        ("baichuan", ["W_pack", "o_proj", "gate_proj"], of_blocks("attention.qkv", "attention.projection", "mlp.gate")),
    ],
)  # fmt: skip
def test_targets_are_found_by_name_and_pattern(name: str, targets: list[str], found: list[str]) -> None:
    assert find_targets(model(name), targets) == found


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("gpt2", "W_pack", "targets[0]=W_pack: names no layer of this model, which has all-linear, attention.qkv, "
         "attention.projection, mlp.up, mlp.down, embeddings, position_embedding (or, as published: c_attn, c_proj, "
         "c_fc)"),
        ("gpt2", "q_proj", "names no layer of this model"),
        ("llama", "c_attn", "(or, as published: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj)"),
        ("llama", "W_pack", "names no layer"),
        ("baichuan", "q_proj", "names no layer"),
        ("gpt2", "qvk", "; did you mean qkv?"),
        ("gpt2", "all_linear", "; did you mean all-linear?"),
        ("gpt2", "attention", "names no layer"),  # a part of a name is a pattern: attention.*
        ("gpt2", "kv", "names no layer"),
        ("gpt2", "nothing.*here", "names no layer"),
        ("gpt2", "*qkv", "targets[0]='*qkv': not a regular expression"),
        ("gpt2", "head", "this model's output layer is its embedding"),
        ("gpt2", "mlp.dropout", "names no layer"),
    ],
)  # fmt: skip
def test_targets_without_match_are_refused(name: str, target: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"targets\[0\]=") as error:
        find_targets(model(name), [target])
    assert message in str(error.value)
    assert "blocks." not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "rank=0: must be positive"),
        ({"alpha": 0.0}, "alpha=0.0: must be positive"),
        ({"dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
        ({"targets": []}, "targets=\\[\\]: nothing would be adapted"),
        ({"also_train": ["("]}, "also_train\\[0\\]='\\(': not a regular expression"),
    ],
)
def test_impossible_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**keys)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gpt2", {"also_train": ["norms"]}, "also_train\\[0\\]='norms': matches no parameter; the nearest are"),
        ("gpt2", {"also_train": ["head"]}, "output layer is its embedding, which would be trained too"),
        ("untied", {"targets": ["head"], "dropout": 0.1}, "dropout=0.1: applies to an adapter's input"),
        ("gpt2", {"targets": ["embeddings"], "dropout": 0.1}, "dropout=0.1: adapters of embeddings have no dropout"),
    ],
)
def test_keys_that_do_not_suit_the_model_are_refused(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**keys).apply(model(name), seeded())


@pytest.mark.parametrize(
    ("config", "rank", "expected"),
    [
        ("gpt124m", 16, 12 * 16 * (768 + 2304 + 768 + 768 + 768 + 3072 + 3072 + 768)),
        ("llama2_7b", 8, 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))),
    ],
)
def test_the_number_of_trained_parameters_is_the_published_one(config: str, rank: int, expected: int) -> None:
    """``rank * (inputs + outputs)`` a layer: 2,359,296 for GPT-2; 19,988,480 for Llama 2, as PEFT counts them."""
    values = yaml.safe_load((Path(__file__).parents[2] / "conf" / "model" / f"{config}.yaml").read_text())
    with torch.device("meta"):
        built = build(values, ModelConfig).build(50257 if config == "gpt124m" else 32000)
        make(rank=rank).apply(built, seeded())
    trained, every = as_unit(built).count_parameters()
    assert trained == expected
    assert every == expected + (124_439_808 if config == "gpt124m" else 6_738_415_616)
