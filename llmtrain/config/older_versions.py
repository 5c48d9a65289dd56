"""Stored configs completed: with the defaults of keys that an older version did not have."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from llmtrain.config.compose import compose
from llmtrain.config.folders import conf_dir
from llmtrain.config.stored_config import FORMER, escape


def complete(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Add to ``stored`` the keys that an older version lacked: as :data:`FORMER` has them, else today's defaults."""
    former = {
        group: {**FORMER.get(str(node.get("_target_")), {}), **node} if isinstance(node, Mapping) else node
        for group, node in stored.items()
    }
    return with_defaults(former)


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Add to ``stored`` the keys that an older version did not have, with today's defaults.

    A group comes from ``conf/train.yaml``, a key of an option from the YAML of that option.  If several YAMLs name
    its class and do not agree (the sizes of a model), the key stays missing: :func:`build` reports it.
    """
    values = dict(stored)
    for group, node in stored.items():
        if isinstance(node, Mapping) and "_target_" in node:
            values[group] = {**node, **_defaults_for(group, node, stored)}
    path = conf_dir() / "train.yaml"
    train: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
    groups = [group for entry in train.get("defaults", []) if isinstance(entry, dict) for group, name in entry.items()
              if name is not None]  # fmt: skip
    if missing := [key for key in (*groups, *train) if key not in values and key not in ("defaults", "_target_")]:
        defaults = compose("train", [])
        values |= {key: defaults[key] for key in missing}
    return values


def _defaults_for(group: str, node: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that ``node`` lacks, from the YAMLs of its group that name its class."""
    found: dict[str, list[Any]] = {}
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        if str(node["_target_"]) not in path.read_text(encoding="utf-8"):  # avoids parsing YAML, which is slow
            continue
        option: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if option.get("_target_") == node["_target_"]:
            for key in option.keys() - node.keys() - {"defaults"}:
                found.setdefault(key, []).append(option[key])
    agreed = {key: options[0] for key, options in found.items() if all(value == options[0] for value in options)}
    if not agreed:
        return {}
    whole = OmegaConf.create({**escape(stored), group: {**escape(node), **agreed}})
    resolved: Any = OmegaConf.to_container(whole, resolve=True)
    return {key: resolved[group][key] for key in agreed}
