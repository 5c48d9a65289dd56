"""Baichuan 2, which transformers does not carry: beside a float64 reference written from its published code."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.reading import load_weights
from llmtrain.hf.writing import config_json, write_checkpoint
from llmtrain.model.llama import Position
from tests.helpers.units import as_unit
from tests.hf.checkpoints import read

HIDDEN, LAYERS, MLP, VOCABULARY, EPS = 48, 2, 80, 131, 1e-6
COMMON = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "hidden_size": HIDDEN,
    "initializer_range": 0.02, "intermediate_size": MLP, "model_max_length": 64, "model_type": "baichuan",
    "num_hidden_layers": LAYERS, "rms_norm_eps": EPS, "_from_model_config": True, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.29.2", "use_cache": True, "vocab_size": VOCABULARY,
    "z_loss_weight": 0,
}  # fmt: skip
SEVEN = COMMON | {"num_attention_heads": 4, "max_position_embeddings": 64}
THIRTEEN = COMMON | {"num_attention_heads": 6, "gradient_checkpointing": False, "tokenizer_class": "BaichuanTokenizer"}


def checkpoint(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random weights by Baichuan's names, in two shards, and a program that must not run; returns them as float64."""
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return random.normal(0, 0.3, shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "lm_head.weight": matrix(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        weights |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "self_attn.W_pack": matrix(3 * HIDDEN, HIDDEN), "self_attn.o_proj": matrix(HIDDEN, HIDDEN),
                "mlp.gate_proj": matrix(MLP, HIDDEN), "mlp.up_proj": matrix(MLP, HIDDEN),
                "mlp.down_proj": matrix(HIDDEN, MLP), "input_layernorm": matrix(HIDDEN) + 1,
                "post_attention_layernorm": matrix(HIDDEN) + 1,
            }.items()
        }  # fmt: skip
    weights["model.norm.weight"] = matrix(HIDDEN) + 1
    folder.mkdir()
    names = list(weights)
    where = {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: torch.from_numpy(weights[name]) for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_baichuan.py").write_text("raise SystemExit('a program of a checkpoint was run')\n")
    return {name: tensor.astype(np.float64) for name, tensor in weights.items()}


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def slopes(heads: int) -> list[float]:
    """``_get_interleave`` of modeling_baichuan.py."""

    def of_power(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return of_power(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return of_power(closest) + slopes(2 * closest)[0::2][: heads - closest]


def reference(weights: dict[str, np.ndarray], ids: np.ndarray, heads: int, *, rotary: bool) -> np.ndarray:
    """Logits ``(sequence, vocabulary)`` of ``ids`` ``(sequence,)``, in float64."""
    length, size = len(ids), HIDDEN // heads
    angles = np.outer(np.arange(length), 1 / 10000 ** (np.arange(0, size, 2) / size))
    cosines, sines = (np.concatenate([f(angles), f(angles)], -1) for f in (np.cos, np.sin))

    def rotate(x: np.ndarray) -> np.ndarray:  # (heads, sequence, size)
        half = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cosines + half * sines

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        w = {name.split(".", 3)[3]: t for name, t in weights.items() if name.startswith(f"model.layers.{layer}.")}
        packed = norm(x, w["input_layernorm.weight"]) @ w["self_attn.W_pack.weight"].T
        q, k, v = (part.reshape(length, heads, size).transpose(1, 0, 2) for part in np.split(packed, 3, axis=-1))
        if rotary:
            q, k = rotate(q), rotate(k)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(size)
        if not rotary:
            distance = np.arange(length)[None, :] - np.arange(length)[:, None]
            scores = scores + np.array(slopes(heads))[:, None, None] * distance
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(length, HIDDEN)
        x = x + mixed @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"])
        gate = y @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    head = head / np.linalg.norm(head, axis=1, keepdims=True)  # NormHead
    return norm(x, weights["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("config", [SEVEN, THIRTEEN], ids=["7B", "13B"])
@pytest.mark.parametrize("fused", [True, False])
def test_logits_of_a_baichuan_checkpoint_equal_its_formulas(
    config: dict[str, Any], fused: bool, tmp_path: Path
) -> None:
    from dataclasses import replace

    weights = checkpoint(tmp_path / "theirs", config)
    model: Any = read(tmp_path / "theirs")
    rotary = config is SEVEN
    assert model.config.position is (Position.rope if rotary else Position.alibi)
    if not fused:
        model = replace(model.config, fused_qkv=False).create(VOCABULARY, torch.device("cpu"), NamedGenerators(1))
        load_weights(model.eval(), tmp_path / "theirs")
    ids = np.random.default_rng(1).integers(VOCABULARY, size=50)
    expected = torch.from_numpy(reference(weights, ids, config["num_attention_heads"], rotary=rotary))
    with torch.no_grad():
        whole = model(torch.from_numpy(ids)[None])[0, :, :VOCABULARY]
        cache = model.new_cache(1, torch.float32)
        parts = [model(part[None], cache)[0] for part in torch.from_numpy(ids).split([20, 1, 29])]
    assert (whole - expected).abs().max() < 1e-5
    assert (torch.cat(parts)[:, :VOCABULARY] - expected).abs().max() < 1e-5

    (tmp_path / "ours").mkdir()
    unit = as_unit(model)
    values = config_json(unit, torch.float32, {}, (), False)
    write_checkpoint(unit, tmp_path / "ours", values, {}, dtype=torch.float32, shard_bytes=10**9)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(np.array_equal(written[name].double().numpy(), weights[name]) for name in weights)
    with torch.no_grad():
        assert torch.equal(read(tmp_path / "ours")(torch.from_numpy(ids)[None])[0, :, :VOCABULARY], whole)


@pytest.mark.parametrize(("changes", "rotary", "normalised"), [
    ({"hidden_size": 4096, "max_position_embeddings": 4096, "vocab_size": 125696}, True, True),
    ({"hidden_size": 5120, "vocab_size": 125696}, False, True),
    ({"hidden_size": 5120, "max_position_embeddings": 4096, "vocab_size": 125696}, False, True),
    ({"hidden_size": 4096, "max_position_embeddings": 4096, "vocab_size": 64000}, True, False),
])  # fmt: skip
def test_the_variant_of_baichuan_follows_from_its_config(
    changes: dict[str, Any], rotary: bool, normalised: bool, tmp_path: Path
) -> None:
    """The published sizes go by ``hidden_size``; the first Baichuan, of 64,000 tokens, has a plain head."""
    from llmtrain.hf.families import family_of_checkpoint

    json_file = ConfigJson(COMMON | {"num_attention_heads": 32} | changes, tmp_path / "config.json")
    config: Any = family_of_checkpoint(json_file).read_config(json_file)
    assert (config.position is Position.rope) == rotary
    assert config.normalised_head == normalised
    assert json_file.unknown() == []
