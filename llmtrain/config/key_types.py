"""The types of config keys, read from the source of their dataclasses, which are not imported: many import torch.

A key belongs to every option of its group, so it has the types of all of them.
"""

import ast
import re
from functools import cache
from pathlib import Path

from llmtrain.config.folders import conf_dir

TEXT, OPTIONAL_TEXT = "str", "str | None"
TEXTS = ("list[str]", "list[str] | None")
PACKAGE = Path(__file__).parents[1]


def types_of(verb: str, key: str) -> set[str]:
    """The annotations of ``key`` in the config of ``verb``, such as ``{"int | None"}``; empty for an unknown key."""
    group, dot, name = key.partition(".")
    if dot:
        options = sorted((conf_dir() / group).glob("*.yaml")) if group.isidentifier() else []
    else:
        options, name = [conf_dir() / f"{'train' if verb == 'resume' else verb}.yaml"], key
    found = (fields(target).get(name) for target in filter(None, map(target_of, options)))
    return {annotation for annotation in found if annotation is not None}


def is_text(verb: str, key: str) -> bool:
    """Return whether the values of ``key`` are texts: names, paths, prompts."""
    return types_of(verb, key) in ({TEXT}, {OPTIONAL_TEXT}, {TEXT, OPTIONAL_TEXT})


def is_list_of_texts(verb: str, key: str) -> bool:
    """Return whether the values of ``key`` are lists of texts."""
    types = types_of(verb, key)
    return bool(types) and types <= set(TEXTS)


def may_be_null(verb: str, key: str) -> bool:
    """Return whether ``null`` is a value of ``key``, by its type or as its default."""
    if any("None" in annotation for annotation in types_of(verb, key)):
        return True
    path = conf_dir() / f"{'train' if verb == 'resume' else verb}.yaml"
    return (
        path.is_file() and re.search(rf"(?m)^{re.escape(key)}: *null\b", path.read_text(encoding="utf-8")) is not None
    )


@cache
def target_of(option: Path) -> str | None:
    """The class that a YAML file names; None for a file that only changes another option."""
    found = (
        re.search(r"(?m)^_target_: *(llmtrain[\w.]*)", option.read_text(encoding="utf-8")) if option.is_file() else None
    )
    return found[1] if found else None


@cache
def fields(target: str) -> dict[str, str]:
    """The annotations of a dataclass of this package, those that it inherits among them."""
    module, _, name = target.rpartition(".")
    tree = _parse(module)
    found: dict[str, str] = {}
    if tree is None:
        return found
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                word = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
                found |= fields(imported.get(word, f"{module}.{word}"))
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    found[item.target.id] = ast.unparse(item.annotation)
    return found


@cache
def _parse(module: str) -> ast.Module | None:
    package, *parts = module.split(".")
    if package != PACKAGE.name:
        return None
    place = PACKAGE.joinpath(*parts)
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
