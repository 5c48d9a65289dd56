"""Adapters in the format of PEFT: write and read ``adapter_config.json`` and ``adapter_model.safetensors``.

``names`` maps our name of each linear and embedding module (others may be in it) to its name in transformers' model
for causal language modelling, or for classification where there is a classifier.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtrain.base.files import share, write_atomically
from llmtrain.base.tensor_files import CheckpointError, read_tensors
from llmtrain.hf import CLASSIFIER
from llmtrain.lora.layers import LoraEmbedding
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.lora.merge import adapters
from llmtrain.lora.targets import EMBEDDING, HEAD, is_end
from llmtrain.model import LanguageModel
from llmtrain.objective import TrainingUnit

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# Keys that change the function of an adapter and have no counterpart here, with the values that leave it unchanged.
UNKNOWN: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None), "target_parameters": (None, []), "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []), "alora_invocation_tokens": (None, []), "use_qalora": (False, None),
    "arrow_config": (None,), "use_bdlora": (None, False), "kasa_config": (None,), "bias": ("none",),
}  # fmt: skip


class AdapterTensor(NamedTuple):
    """A tensor of an adapter file, and its parameter here."""

    name: str  # of our parameter
    parameter: Tensor  # without vocabulary padding
    transposed: bool = False  # there, as in the Conv1D of transformers' GPT-2


def export_adapter(
    unit: TrainingUnit,
    lora: LowRankAdaptation,
    names: Mapping[str, str],
    to: Path,
    *,
    base: str | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write the adapters of ``unit`` and the modules trained beside them, for ``PeftModel.from_pretrained(…, to)``.

    ``base``: the directory or hub name of the base model, for PEFT to find it.  ``fan_in_fan_out``: transformers stores
    the blocks' matrices transposed, as in GPT-2.  Raises ValueError for a trained parameter that PEFT cannot store.
    """
    with_adapter = adapters(unit.model)
    targets = [names[name] for name in with_adapter]
    whole = trained_modules(unit, names)
    tied = not hasattr(unit.model, HEAD)
    if tied and EMBEDDING in whole:
        raise ValueError(
            f"lora.also_train: {EMBEDDING} is the output layer too, and PEFT would train the input alone; "
            "export format=huggingface, merged"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if any(is_classifier(name) for name in whole) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": shortest_suffixes(targets, [name for name in names.values() if name not in targets]),
        "modules_to_save": [names[name] for name in whole] or None,
        "use_rslora": lora.kind == "rslora",
        "use_dora": lora.has_magnitude,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    for key, entry in adapter_tensors(unit, names, fan_in_fan_out=fan_in_fan_out):
        tensor = entry.parameter.detach().cpu()
        tensors[key] = (tensor.t() if entry.transposed else tensor).contiguous()
    to.mkdir(parents=True, exist_ok=True)
    save_file(tensors, to / TENSORS, metadata={"format": "pt"})
    share(to / TENSORS)
    write_atomically(to / CONFIG, json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def import_adapter(unit: TrainingUnit, lora: LowRankAdaptation, names: Mapping[str, str], path: Path) -> None:
    """Copy a PEFT adapter into the adapters that ``lora`` added to ``unit``.

    Raises ValueError for a setting that differs from this run's, and :class:`CheckpointError` naming the tensors that
    are missing, unexpected or of another shape.
    """
    config = read_config(path)
    check_config(config, lora, path)
    if not (path / TENSORS).is_file():
        if (path / PICKLE).is_file():
            raise ValueError(
                f"{path / PICKLE}: a pickle, which could run code; with PEFT, model.save_pretrained(DIR) writes "
                f"{TENSORS} instead"
            )
        raise ValueError(f"{path}: has no {TENSORS}")
    tensors = read_tensors(path / TENSORS)
    expected = dict(adapter_tensors(unit, names, fan_in_fan_out=bool(config.get("fan_in_fan_out"))))
    problems = [f"{key} ({entry.name}) is missing" for key, entry in expected.items() if key not in tensors]
    for key, tensor in tensors.items():
        if key in expected:
            entry = expected[key]
            shape = tuple(reversed(entry.parameter.shape)) if entry.transposed else tuple(entry.parameter.shape)
            if tuple(tensor.shape) != shape:
                problems.append(f"{key} is {tuple(tensor.shape)}, {entry.name} here is {shape}")
        elif problem := differs_from_base(key, tensor, unit.model, names):
            problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        shown = "; ".join(problems[:3])
        raise CheckpointError(f"{path / TENSORS}: does not fit lora.targets and lora.also_train: {shown}{more}")
    for key, entry in expected.items():
        entry.parameter.copy_(tensors[key].t() if entry.transposed else tensors[key])


def adapter_tensors(
    unit: TrainingUnit, names: Mapping[str, str], *, fan_in_fan_out: bool
) -> Iterator[tuple[str, AdapterTensor]]:
    """All tensors of the adapter file of ``unit``, by their names there."""
    for name, adapter in adapters(unit.model).items():
        key = PREFIX + names[name]
        for matrix, parameter in (("A", adapter.lora_A), ("B", adapter.lora_B)):
            there = f"lora_embedding_{matrix}" if isinstance(adapter, LoraEmbedding) else f"lora_{matrix}.weight"
            yield f"{key}.{there}", AdapterTensor(f"{name}.lora_{matrix}", parameter)
        if adapter.lora_magnitude is not None:
            yield f"{key}.lora_magnitude_vector", AdapterTensor(f"{name}.lora_magnitude", adapter.lora_magnitude)
    for name, module in trained_modules(unit, names).items():
        for part, parameter in module.named_parameters():
            rows = unit.model.vocab_size if name in (EMBEDDING, HEAD) else len(parameter)
            transposed = fan_in_fan_out and isinstance(module, nn.Linear) and name.startswith("blocks.")
            entry = AdapterTensor(f"{name}.{part}", parameter[:rows], transposed and part == "weight")
            yield f"{PREFIX}{names[name]}.{part}", entry


def trained_modules(unit: TrainingUnit, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """The modules that are fully trained beside the adapters: PEFT's ``modules_to_save``.

    Raises ValueError for a trained parameter outside of them.
    """
    found: dict[str, nn.Module] = {}
    with_adapter = adapters(unit.model)
    for full, parameter in unit.named_weights():
        name, _, part = full.rpartition(".")
        if not parameter.requires_grad or (name in with_adapter and part.startswith("lora_")):
            continue
        module = unit.weight_module(name)
        if name in with_adapter or not all(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"lora.also_train: {full} is trained and other parameters of {name} are not; PEFT stores only whole "
                "modules; export format=huggingface, merged"
            )
        if name not in names:
            raise ValueError(
                f"lora.also_train: {name} has no counterpart in transformers' model; export format=huggingface, merged"
            )
        found[name] = module
    return found


def is_classifier(name: str) -> bool:
    return f"{name}.weight" == CLASSIFIER


def shortest_suffixes(targets: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest name suffixes, starting after a dot, that match all of ``targets`` and none of ``others``."""
    targets, others = sorted(set(targets)), set(others)
    ends: dict[str, None] = {}
    for name in targets:
        parts = name.split(".")
        candidates = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        ends[next(end for end in candidates if not any(is_end(end, other) for other in others))] = None
    return list(ends)


def read_config(path: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.  Raises ValueError, naming it."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / CONFIG}: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path / CONFIG}: peft_type={kind}: only LORA can be read")
    return config


def check_config(config: Mapping[str, Any], lora: LowRankAdaptation, path: Path) -> None:
    """Raise ValueError unless an adapter of PEFT's ``config`` computes the same as one of ``lora``."""
    kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    if config.get("use_dora") and config.get("use_rslora"):
        raise ValueError(f"{path / CONFIG}: use_dora=true use_rslora=true: only one of them is supported")
    check_kind(lora, kind, config.get("r"), config.get("lora_alpha"), path)
    for theirs, value in (("rank_pattern", lora.rank), ("alpha_pattern", lora.alpha)):
        others = {name: other for name, other in (config.get(theirs) or {}).items() if other != value}
        if others:
            raise ValueError(f"{path / CONFIG}: {theirs}={others}: all layers share one rank and one alpha here")
    for key, unused in UNKNOWN.items():
        if key in config and config[key] not in unused:
            raise ValueError(f"{path / CONFIG}: {key}={config[key]}: has no counterpart here")


def check_kind(lora: LowRankAdaptation, kind: str, rank: Any, alpha: Any, path: Path) -> None:
    """Raise ValueError unless the adapters of ``path`` have the kind, rank and alpha of ``lora``."""
    if kind != lora.kind:
        raise ValueError(f"lora={lora.kind}: the adapters of {path} are of another kind; lora={kind}")
    for key, value in (("rank", rank), ("alpha", alpha)):
        if value != getattr(lora, key):
            raise ValueError(
                f"lora.{key}={getattr(lora, key):g}: the adapters of {path} have {value}; lora.{key}={value}"
            )


def differs_from_base(key: str, tensor: Tensor, model: LanguageModel, names: Mapping[str, str]) -> str | None:
    """The problem with a tensor that belongs to no adapter; None for an unchanged embedding of the base.

    PEFT also stores the base's embeddings where they are adapted or may have been enlarged.
    """
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".").removesuffix(".weight")
    ours = next((our for our, their in names.items() if their == name), None)
    if ours is None and is_end("lm_head", name) and not hasattr(model, HEAD):
        ours = EMBEDDING
    if ours not in (EMBEDDING, HEAD):
        return f"{key} has no place in this model"
    module: Any = model.get_submodule(ours)
    weight = (module.own_weight if hasattr(module, "own_weight") else module.weight)[: model.vocab_size]
    if tensor.shape != weight.shape or not torch.equal(tensor.to(weight), weight):
        return f"{key} is not the weight of {ours}: the adapter was made for another base"
    return None
