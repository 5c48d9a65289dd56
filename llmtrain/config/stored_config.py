"""``config.yaml`` of a run: every value, typed, without secrets; written, read back as data, compared.

Composing is the task of :mod:`llmtrain.config.compose`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from llmtrain.base.process import cache_folder
from llmtrain.base.stored_files import StoredFileError
from llmtrain.base.stored_yaml import read_yaml
from llmtrain.config.secret_values import redact

NOT_RUN_KEYS = ("run_dir", "output_dir", "plugins")  # places and code, not settings of the run
CACHE = "data.cache_dir"  # as they are, a key of a group
MOVED = {  # classes by the names that older versions wrote
    "llmtrain.lora.NoLora": "llmtrain.lora.none.NoLora",
    "llmtrain.checkpoint.Checkpoint": "llmtrain.checkpoint.policy.Checkpoint",
    "llmtrain.loop_config.LoopConfig": "llmtrain.train.config.LoopConfig",
    "llmtrain.runtime.Runtime": "llmtrain.base.runtime.Runtime",
    "llmtrain.run.Run": "llmtrain.run.run.Run",
    "llmtrain.recovery.off.Off": "llmtrain.recovery.off.RecoveryOff",
    "llmtrain.recovery.on.On": "llmtrain.recovery.on.RecoveryOn",
    "llmtrain.data.labelled.Labelled": "llmtrain.data.labelled.LabelledText",
}


REMOVED = {"checkpoint": ("step",)}  # keys that older versions wrote, by group: they never changed what a run does

FORMER: dict[str, dict[str, Any]] = {  # of keys that older versions did not have, the values that mean what those did
    "llmtrain.data.instruction.Instruction": {"split_at_responses": True},
    "llmtrain.data.python_docs.PythonDocs": {"remove_repeats": False},
    "llmtrain.data.python_stdlib.PythonStdlib": {"split": "documents"},
    "llmtrain.data.shards.Shards": {"dtype": "uint16"},
    "llmtrain.data.text.Text": {"files": "plain", "split": "documents"},
    "llmtrain.objective.classification.Classification": {"weighted_mean": False},
    "llmtrain.precision.auto.Auto": {"residual": "fp32"},
    "llmtrain.precision.bf16.BF16": {"residual": "fp32"},
    "llmtrain.precision.fp8.FP8": {"residual": "fp32"},
    "llmtrain.tokenizer.huggingface.HuggingFace": {"version": 1},
    "llmtrain.tokenizer.sentencepiece.SentencePiece": {"version": 1},
    "llmtrain.train.config.LoopConfig": {"whole_batches": True},
}


class ConfigError(ValueError):
    """A config that cannot be used; the message names key, value and remedy."""


def to_plain(value: Any, *, in_list: bool = False) -> Any:
    """Built dataclasses as plain, typed values: the inverse of :func:`build`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        target = {} if in_list else {"_target_": f"{type(value).__module__}.{type(value).__qualname__}"}
        return target | {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, in_list=True) for item in value]
    return value


def dump(run: Any) -> str:
    """``config.yaml``: every value of ``run``, typed, without secrets."""
    return yaml.safe_dump(redact(to_plain(run)), sort_keys=False, allow_unicode=True, width=120)


def load(path: Path) -> dict[str, Any]:
    """A stored config.  It is data: nothing in it is interpolated or executed.  Raises :class:`ConfigError`."""
    try:
        config = read_yaml(path)
    except StoredFileError as error:
        raise ConfigError(str(error)) from error
    _check_plain(config, path)
    for group, keys in REMOVED.items():
        for key in keys if isinstance(config.get(group), dict) else ():
            config[group].pop(key, None)
    for node in (config, *config.values()):
        if isinstance(node, dict) and str(node.get("_target_")) in MOVED:
            node["_target_"] = MOVED[node["_target_"]]
    return config


def _check_plain(config: Mapping[Any, Any], path: Path) -> None:
    """Refuse keys with a meaning to Hydra: with ``hydra.callbacks`` a stored config could execute any code."""
    nodes = {"": config} | {f"{key}.": node for key, node in config.items() if isinstance(node, Mapping)}
    for prefix, node in nodes.items():
        for key in node:
            if not isinstance(key, str) or not key.isidentifier() or key in ("hydra", "defaults"):
                raise ConfigError(f"{path}: {prefix}{key}: no key of a run's config")


def untrusted(values: dict[str, Any], plugins: Sequence[str] = ()) -> dict[str, Any]:
    """A stored config with the ``plugins`` that the user names now in place of those that it names itself.

    Nor does it decide where anything is written: the cache is that of this machine, unless the user names another.
    """
    values = values | {"plugins": list(plugins)}
    if isinstance(data := values.get("data"), dict) and "cache_dir" in data:
        values["data"] = data | {"cache_dir": str(cache_folder())}
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def escape(value: Any) -> Any:
    """Resolved values for OmegaConf: a literal ``${`` stays literal."""
    if isinstance(value, Mapping):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    if isinstance(value, str):  # backslashes before it would escape the added one
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
    return value
