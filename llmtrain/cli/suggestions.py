"""Suggestions for unknown keys, options and flags: the closest match, or the valid names."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from llmtrain.base.checks import did_you_mean


def flag_hint(verb: str, name: str, value: str, flags: Sequence[str]) -> str:
    """Suggest, for an unknown flag, the key of the same name without dashes, else the closest flag."""
    from llmtrain.config.compose import compose

    word = name.lstrip("-").replace("-", "_")
    keys = flatten(compose("train" if verb == "resume" else verb, [])) if len(word) > 1 else []
    same = [key for key in keys if key.rsplit(".", 1)[-1] == word or key == word]
    if not same:
        return names_hint(name, flags)
    value = value if value and "=" not in value and not value.startswith("-") else "…"
    return f"; settings have no dashes: {' or '.join(f'{key}={value}' for key in same)}"


def key_hint(key: str, verb: str) -> str:
    """Suggest, for an unknown key, the closest key of the verb's config in any group, else the keys beside it."""
    from llmtrain.config.compose import compose

    known = flatten(compose("train" if verb == "resume" else verb, []))
    last = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == last]
    siblings = [name for name in known if name.rsplit(".", 1)[0] == key.rsplit(".", 1)[0]] if "." in key else []
    longer = [name for name in siblings if name.rsplit(".", 1)[-1].startswith(f"{last}_")]
    best = same_name or difflib.get_close_matches(key, siblings, n=1) or difflib.get_close_matches(key, known, n=1)
    group, _, name = key.partition(".")
    if name and group in known and not same_name and (options := options_with(group, name)):
        return f"; the chosen option of {group} has none, others have: {' or '.join(f'{group}={o}' for o in options)}"
    if longer and not same_name:
        return f"; did you mean {' or '.join(longer)}?"
    if best == [key]:
        return f"; the chosen option of {group} has none (its keys: --cfg job --package {group})"
    if best:
        return f"; did you mean {best[0]}?"
    groups = sorted({name.split(".")[0] for name in known})
    return f"; there are: {', '.join(siblings or groups)}"


def options_with(group: str, name: str) -> list[str]:
    """List the options of ``group`` that have a key ``name``."""
    from llmtrain.config.folders import conf_dir

    files = sorted((conf_dir() / group).glob("*.yaml")) if group.isidentifier() else []
    return [file.stem for file in files if re.search(rf"(?m)^{re.escape(name)}:", file.read_text(encoding="utf-8"))]


def flatten(values: dict[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys of a nested config, groups included."""
    keys = []
    for key, value in values.items():
        if key != "_target_":
            keys.append(prefix + key)
            keys += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys


def names_hint(name: str, known: Sequence[str]) -> str:
    """Suggest the closest name and list all: "; did you mean adamw? there are: …"."""
    return f"{did_you_mean(name, known, cutoff=0.6) or ';'} there are: {', '.join(known)}"
