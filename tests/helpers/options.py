"""The options of a group as conf/ has them, so that the tests of a contract find a new one by themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config.build import build

CONF = Path(__file__).parents[2] / "conf"


def option_names(group: str) -> list[str]:
    """Every option of ``group``."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def make_option(group: str, name: str, common: Mapping[str, Any], **keys: Any) -> Any:
    """The option with the values of its YAML, those of ``common`` for the keys that it has, and ``keys``.

    A value that refers to another key, such as ``${optimizer.lr}``, is that key's.
    """
    values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    values |= {key: value for key, value in common.items() if key in values} | keys
    for key, value in values.items():
        if isinstance(value, str) and value.startswith("${"):
            values[key] = (values | common)[value[2:-1].rpartition(".")[2]]
    return build(values, object)
