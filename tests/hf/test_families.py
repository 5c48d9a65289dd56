"""Every family beside transformers: in, out, and around."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.hf.families import family_of_model, module_names
from llmtrain.hf.writing import config_json, write_checkpoint
from llmtrain.inference.generate import Sampling, generate
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.model.llama import LlamaConfig
from tests.helpers.units import as_unit
from tests.hf.checkpoints import CASES, SIZES, largest_difference, make, read, some_ids

FP32 = torch.float32
TOLERANCE = 1e-5


def export(model: LanguageModel, folder: Path, shard_bytes: int = 10**9) -> Path:
    folder.mkdir()
    unit = as_unit(model)
    write_checkpoint(unit, folder, config_json(unit, FP32, {}, (), False), {}, dtype=FP32, shard_bytes=shard_bytes)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def with_cache(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of ``ids`` read in three stretches."""
    cache = model.new_cache(len(ids), FP32)
    parts = [model(part, cache) for part in ids.split([17, 1, ids.shape[1] - 18], dim=1)]
    return torch.cat(parts, dim=1)[..., : model.vocab_size]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_equal_after_reading_and_after_writing(case: str, tmp_path: Path) -> None:
    theirs = make(*CASES[case], tmp_path / "theirs")
    # Dynamic scaling begins behind max_position_embeddings, and so does what there is to compare.
    ours = read(tmp_path / "theirs", **({"context_length": 64} if case == "dynamic" else {}))
    ids = some_ids()
    assert largest_difference(ours, theirs, ids) < TOLERANCE
    if case != "dynamic":  # with a cache, transformers turns the earlier keys of a text by other angles
        with torch.no_grad():
            assert (with_cache(ours, ids) - theirs(ids).logits).abs().max() < TOLERANCE

    folder = export(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert largest_difference(ours, back, ids) < TOLERANCE
    before, after = tensors(tmp_path / "theirs"), tensors(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    length = 12 if case == "dynamic" else 30
    asked = ids[:1, : length // 2]
    greedy = generate(
        ours, asked[0].tolist(), max_tokens=length - length // 2, sampling=Sampling(0.0, 0, 1.0),
        generator=torch.Generator(), dtype=FP32, end_of_text=-1,
    )  # fmt: skip
    text = back.generate(asked, max_new_tokens=length - length // 2, do_sample=False)[0, length // 2 :]
    assert list(greedy) == text.tolist()


def test_the_sliding_window_of_a_checkpoint_matters(tmp_path: Path) -> None:
    """Else the cases with windows would show nothing."""
    make(*CASES["qwen2 windows"], tmp_path / "a")
    model: Any = read(tmp_path / "a")
    assert [model.config.window(layer) for layer in range(3)] == [None, 7, 7]
    ids = some_ids()
    kind, keys = CASES["qwen2 windows"]
    without = make(kind, keys | {"use_sliding_window": False}, tmp_path / "b")
    assert largest_difference(model, without, ids) > 0.1


@pytest.mark.parametrize("case", ["gpt2 untied", "llama tied"])
def test_sharded_checkpoints_are_read_and_written(case: str, tmp_path: Path) -> None:
    theirs = make(*CASES[case], tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = read(tmp_path / "theirs")
    assert largest_difference(ours, theirs, some_ids()) < TOLERANCE
    folder = export(ours, tmp_path / "ours", shard_bytes=60_000)
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 70_000 for file in files)
    back = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert largest_difference(ours, back, some_ids()) < TOLERANCE
    assert largest_difference(read(folder), theirs, some_ids()) < TOLERANCE


def test_a_checkpoint_without_a_head_is_read(tmp_path: Path) -> None:
    """As OpenAI's GPT-2 is on the hub: names without prefix, and the causal mask among the tensors."""
    from safetensors.torch import save_file

    theirs = make(*CASES["gpt2"], tmp_path / "whole")
    theirs.transformer.save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare" / "model.safetensors"
    stored = load_file(file)
    assert "wte.weight" in stored
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
    save_file(stored | masks, file)
    assert largest_difference(read(tmp_path / "bare"), theirs, some_ids()) < TOLERANCE


def test_a_bf16_checkpoint_is_read_in_fp32(tmp_path: Path) -> None:
    kind, keys = CASES["llama"]
    make(kind, keys, tmp_path / "a").bfloat16().save_pretrained(tmp_path / "b")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=FP32).eval()
    ours = read(tmp_path / "b")
    assert next(ours.parameters()).dtype == FP32
    assert largest_difference(ours, theirs, some_ids()) < TOLERANCE


def test_a_joint_qkv_matrix_is_split(tmp_path: Path) -> None:
    """Three layers there, one here: put together on the way in, taken apart on the way out."""
    from dataclasses import replace

    from llmtrain.hf.reading import load_weights

    theirs = make(*CASES["qwen2"], tmp_path / "a")
    config: Any = read(tmp_path / "a").config
    fused = replace(config, fused_qkv=True).create(301, torch.device("cpu"), NamedGenerators(1)).eval()
    load_weights(fused, tmp_path / "a")
    assert fused.blocks[0].attention.qkv.weight.shape == (96, 48)
    assert largest_difference(fused, theirs, some_ids()) < TOLERANCE
    before, after = tensors(tmp_path / "a"), tensors(export(fused, tmp_path / "b"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "blocks.0.attention.qkv" not in module_names(fused)  # no one module there


@pytest.mark.parametrize(("qkv", "output", "mlp", "window", "kind"), [
    (True, False, False, None, "qwen2"), (True, True, False, None, "llama"), (False, True, False, None, "llama"),
    (False, False, True, None, "llama"), (False, False, False, (5, 0), "mistral"),
    (False, False, False, (5, 1), "qwen2"), (True, False, False, (5, 0), "qwen2"),
])  # fmt: skip
def test_biases_that_only_the_format_has_are_written_as_zeros(
    qkv: bool, output: bool, mlp: bool, window: tuple[int, int] | None, kind: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    make(*CASES["llama"], tmp_path / "a")
    config: Any = read(tmp_path / "a").config
    size, first = window or (None, 0)
    changed = replace(config, qkv_bias=qkv, output_bias=output, mlp_bias=mlp, sliding_window=size,
                      sliding_window_from_layer=first)  # fmt: skip
    model = changed.create(301, torch.device("cpu"), NamedGenerators(3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    folder = export(model, tmp_path / "b")
    assert f'"{kind}"' in (folder / "config.json").read_text()
    back = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert largest_difference(model, back, some_ids()) < TOLERANCE


def test_a_gpt2_without_qkv_bias_survives_a_round_trip(tmp_path: Path) -> None:
    config = GPTConfig(2, 48, 4, 64, 301, 0.0, False, True, None, Initialisation.gpt2)
    model = config.create(301, torch.device("cpu"), NamedGenerators(3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        model.get_parameter("token_embedding.weight")[301:] = 0.0
    folder = export(model, tmp_path / "a")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert largest_difference(model, back, some_ids()) < TOLERANCE
    again = config.create(301, torch.device("cpu"), NamedGenerators(5))
    from llmtrain.hf.reading import load_weights

    load_weights(again, folder)  # zeros are no bias
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("changes", "message"), [
    ({"logit_softcap": 30.0}, r"model\.logit_softcap=30\.0"),
    ({"qk_norm": True, "mlp_bias": True}, r"model\.mlp_bias=true.*qk_norm"),
    ({"sliding_window": 5, "output_bias": True}, r"model\.output_bias=true.*sliding_window"),
    ({"normalised_head": True, "qkv_bias": True, "num_kv_heads": 4}, r"model\.qkv_bias=True.*normalised_head"),
])  # fmt: skip
def test_models_that_transformers_cannot_compute_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    make(*CASES["llama"], tmp_path / "a")
    config: Any = replace(read(tmp_path / "a").config, **changes)  # type: ignore[arg-type]
    assert isinstance(config, LlamaConfig)
    with pytest.raises(ValueError, match=message):
        family_of_model(config).write_config(config, 301)


@pytest.mark.parametrize("case", ["gpt2 untied", "llama", "qwen3"])
def test_module_names_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = make(*CASES[case], tmp_path / "theirs")
    ours = read(tmp_path / "theirs")
    names = module_names(ours)
    assert len(set(names.values())) == len(names)
    there = {name for name, module in theirs.named_modules() if hasattr(module, "weight")}
    assert set(names.values()) == there
    assert set(names) == {name for name, module in ours.named_modules() if "weight" in dict(module.named_parameters())}


def test_the_cases_have_fewer_heads_of_keys_than_of_queries() -> None:
    """Fewer heads of keys than of queries, so that one cannot stand for the other."""
    assert SIZES["num_key_value_heads"] != SIZES["num_attention_heads"]
