"""No key of ``config.json`` that changes what is computed is passed over."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from llmtrain.hf.auto import AutoModel
from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.families import family_of_checkpoint
from llmtrain.model.layers.rotary import Scaling
from tests.hf.checkpoints import GPT2_SIZES, SIZES

LLAMA = {"model_type": "llama", "hidden_act": "silu"} | SIZES
GPT2 = {"model_type": "gpt2"} | GPT2_SIZES
QWEN2 = {"model_type": "qwen2"} | SIZES
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def config_of(values: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(values))
    config = ConfigJson.read(folder)
    return family_of_checkpoint(config).read_config(config)


@pytest.mark.parametrize(("values", "message"), [
    (LLAMA | {"model_type": "mamba"}, r'config\.json: model_type="mamba": not a known family.*baichuan'),
    ({key: LLAMA[key] for key in LLAMA if key != "model_type"}, r"model_type=null"),
    (LLAMA | {"hidden_act": "gelu"}, r'hidden_act="gelu"'),
    (LLAMA | {"hidden_size": "48"}, r'hidden_size="48": a positive integer'),
    (LLAMA | {"hidden_size": True}, r"hidden_size=true"),
    ({key: LLAMA[key] for key in LLAMA if key != "intermediate_size"}, r"intermediate_size=null"),
    (LLAMA | {"rms_norm_eps": 0}, r"rms_norm_eps=0: a positive number"),
    (LLAMA | {"attention_bias": "yes"}, r"attention_bias=\"yes\""),
    (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, r"rope_scaling=.*longrope is not supported"),
    (LLAMA | {"rope_scaling": {"type": "su", "factor": 2.0}}, r"rope_type su is not supported"),
    (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling=.*factor is missing"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"low_freq_factor is missing"),
    (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, r"rope_factor must be a positive number"),
    (LLAMA | {"rope_scaling": YARN | {"beta_fast": 16}}, r"beta_fast is not supported"),
    (LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.0}}, r"attention_factor is not supported"),
    (LLAMA | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}}, r"mscale"),
    (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"rope_parameters=.*one set"),
    (LLAMA | {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor"),
    (LLAMA | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
    (LLAMA | {"rope_interleaved": True}, r"rope_interleaved=true"),
    (LLAMA | {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0"),
    (LLAMA | {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0"),
    (LLAMA | {"num_local_experts": 8}, r"num_local_experts=8: mixtures"),
    (LLAMA | {"quantization_config": {"bits": 4}}, r"quantization_config=.*quantised"),
    (QWEN2 | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, r"layer_types="),
    (QWEN2 | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, r"layer_types=.*use_sliding_window"),
    (QWEN2 | {"use_sliding_window": True, "max_window_layers": -1}, r"max_window_layers=-1"),
    (GPT2 | {"activation_function": "relu"}, r'activation_function="relu"'),
    (GPT2 | {"n_inner": 100}, r"n_inner=100: must be 4 \* n_embd = 192"),
    (GPT2 | {"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon=1e-06"),
    (GPT2 | {"scale_attn_weights": False}, r"scale_attn_weights=false"),
    (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=true"),
    (GPT2 | {"add_cross_attention": True}, r"add_cross_attention=true"),
])  # fmt: skip
def test_settings_computed_otherwise_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(values, tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "cut or damaged"), ("[]", "not a JSON object"), ("[" * 100_000, "cut or damaged"), (b"\xff\xfe", "cut"),
])  # fmt: skip
def test_a_damaged_config_json_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        ConfigJson.read(tmp_path)


@pytest.mark.parametrize("kind", [
    transformers.GPT2Config, transformers.LlamaConfig, transformers.MistralConfig, transformers.Qwen2Config,
    transformers.Qwen3Config,
])  # fmt: skip
def test_every_key_of_transformers_is_known(kind: type, tmp_path: Path) -> None:
    """Those of this version, with their defaults; the sizes that config.json may leave out are the same."""
    kind().to_json_file(tmp_path / "config.json", use_diff=False)
    config = ConfigJson.read(tmp_path)
    family_of_checkpoint(config).read_config(config)
    assert config.unknown() == []


@pytest.mark.parametrize(("theirs", "expected"), [
    ({"rope_theta": 5e5}, (5e5, Scaling.none, None, None)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, (5e5, Scaling.none, None, None)),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, (1e4, Scaling.linear, 2.0, None)),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, (1e4, Scaling.dynamic, 2.0, 128)),
    ({"rope_scaling": YARN | {"beta_fast": 32.0, "truncate": True}}, (1e4, Scaling.yarn, 4.0, 32)),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, (1e4, Scaling.yarn, 4.0, 128)),
])  # fmt: skip
def test_rotary_settings_are_read_by_old_and_new_names(
    theirs: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    """By their old names and their new ones."""
    found = config_of(LLAMA | theirs, tmp_path)
    assert (found.rope_theta, found.rope_scaling, found.rope_factor, found.rope_original_context_length) == expected


def test_unknown_keys_are_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA | {"my_attention": "odd", "unused": None, "use_cache": True})
    )
    config = ConfigJson.read(tmp_path)
    family_of_checkpoint(config).read_config(config)
    assert config.unknown() == ["my_attention"]


def test_context_length_is_at_most_the_checkpoints(tmp_path: Path) -> None:
    """Of a checkpoint at most what it has; with dynamic scaling, what that reaches."""
    config_of(LLAMA, tmp_path)
    assert AutoModel(str(tmp_path), 100, 0.1, None).resolved().context_length == 100
    with pytest.raises(ValueError, match=r"context_length=129: the model would be longer than its positions, 128 in "):
        AutoModel(str(tmp_path), 129, 0.0, None).resolved()
    config_of(LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, tmp_path)
    assert AutoModel(str(tmp_path), 256, 0.0, None).resolved().context_length == 256
    with pytest.raises(ValueError, match="longer than its positions"):
        AutoModel(str(tmp_path), 257, 0.0, None).resolved()
