"""Write a model of ours as a checkpoint directory that transformers loads."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.base.files import share
from llmtrain.hf import CLASSIFIER, ModelFamily, TensorMap, config_of
from llmtrain.hf.config_json import NAME
from llmtrain.hf.directory import INDEX, SINGLE, tensor_bytes
from llmtrain.hf.families import family_of_model, with_classifier
from llmtrain.hf.reading import shapes_of
from llmtrain.model import LanguageModel
from llmtrain.objective import TrainingUnit

GENERATION = "generation_config.json"


def config_json(
    unit: TrainingUnit,
    dtype: torch.dtype,
    tokens: Mapping[str, int | None],
    labels: Sequence[str],
    multi_label: bool,
    *,
    has_qwen_tokenizer: bool = True,
) -> dict[str, Any]:
    """The content of ``config.json``; ``tokens``: ids by key, such as ``eos_token_id``; ``labels``: of a classifier.

    A ``pad_token_id`` beyond the vocabulary enlarges it; the embedding of that token is 0 and is never used.
    Raises ValueError, naming our key, for a model that transformers cannot compute.
    """
    model = unit.model
    config = config_of(model)
    family = family_of_model(config)
    values = family.write_config(config, model.vocab_size, has_qwen_tokenizer=has_qwen_tokenizer)
    name = str(dtype).removeprefix("torch.")
    values |= {**tokens, "dtype": name, "torch_dtype": name}  # by its new and its old name
    padding = tokens.get("pad_token_id")
    values["vocab_size"] = max(model.vocab_size, 0 if padding is None else padding + 1)
    if not unit.heads:
        return values
    causal = values["architectures"][0]
    if values["model_type"] not in ("gpt2", "llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"objective=classification: {values['model_type']} has no classifier in transformers")
    if getattr(unit.heads["classifier"], "bias", None) is not None:
        raise ValueError("objective=classification: the classifier has a bias; the one in transformers has none")
    kind = causal.replace("LMHeadModel", "ForSequenceClassification").replace(
        "ForCausalLM", "ForSequenceClassification"
    )
    return values | {
        "architectures": [kind],
        "num_labels": len(labels),
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": f"{'multi' if multi_label else 'single'}_label_classification",
    }


@torch.no_grad()
def write_checkpoint(
    unit: TrainingUnit,
    folder: Path,
    values: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write weights and config into ``folder``, in files of up to ``shard_bytes``, without vocabulary padding.

    ``values``: from :func:`config_json`; ``generation``: more keys of ``generation_config.json``.  Never more than a
    copy of the tensors of one file is in memory.
    """
    config = config_of(unit.model)
    state = unit.weights_state()
    family = family_of_model(config)
    maps = family.names(config, values["model_type"])
    if CLASSIFIER in state:
        maps = with_classifier(maps)
    shards = split_shards(maps, state, dtype, shard_bytes)
    total, where = 0, {}
    for index, shard in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(export_tensors(shard, state, dtype))
        if (embedding := tensors.get(family.embedding)) is not None:
            tensors[family.embedding] = F.pad(embedding, (0, 0, 0, values["vocab_size"] - len(embedding)))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        share(folder / name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        where.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    _write_json(folder / NAME, values)
    if CLASSIFIER not in state:
        tokens = {key: value for key, value in values.items() if key.endswith("_token_id") and value is not None}
        _write_json(folder / GENERATION, {**tokens, **generation})


def split_shards(
    maps: Sequence[TensorMap], state: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int
) -> list[list[TensorMap]]:
    """``maps`` in parts of up to ``shard_bytes``; a larger tensor is a part of its own."""
    shards: list[list[TensorMap]] = [[]]
    used = 0
    for each in maps:
        size = sum(tensor_bytes(shape, dtype) for shape in shapes_of(each, state))
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(each)
        used += size
    return shards


def export_tensors(
    maps: Sequence[TensorMap], state: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint with their names there."""
    for each in maps:
        if not each.ours:
            for name in each.theirs:
                yield name, torch.zeros(each.zeros, dtype=dtype)
            continue
        sources = [state[name] for name in each.ours]
        whole = sources[0] if len(sources) == 1 else torch.cat(sources)
        whole = whole.T if each.transposed else whole
        parts = whole.split(each.rows) if each.rows else (whole,)
        for name, part in zip(each.theirs, parts, strict=True):
            yield name, part.to("cpu", dtype, copy=True).contiguous()


def is_transposed(family: ModelFamily, model: LanguageModel, model_type: str) -> bool:
    """True if the matrices of linear layers are stored as (inputs, outputs)."""
    return any(each.transposed for each in family.names(config_of(model), model_type))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
