"""Building checked dataclasses from plain configs.

A node's ``_target_`` names a frozen dataclass of ours.  The node is merged into that dataclass' schema, so every key
and type is checked and errors name ``group.key``.  ``hydra.utils.instantiate`` is never called: it runs whatever a
config names, and run directories travel.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtrain.base.checks import did_you_mean
from llmtrain.config.folders import conf_dir
from llmtrain.config.stored_config import ConfigError, escape
from llmtrain.config.suggestions import remedy

T = TypeVar("T")


def build(node: Mapping[str, Any], base: type[T], *, path: str = "", plugins: Sequence[str] = ()) -> T:
    """Build the dataclass that ``node["_target_"]`` names, a ``base``, with everything below it.

    ``node`` is plain and resolved.  ``path`` is the dotted key of the node, for messages.  Targets outside of this
    package and of ``plugins`` are refused, and so is anything that is not a dataclass defined there.
    """
    if not isinstance(plugins, list | tuple):
        raise ConfigError(f"plugins={plugins}: must be a list, in brackets: 'plugins=[{plugins}]'")
    cls: Any = _find_class(node.get("_target_"), base, path, plugins)
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    dotted = f"{path}." if path else ""
    _check_keys(node, [*names, "_target_"], dotted)
    required = [f.name for f in dataclasses.fields(cls) if f.init and f.default is f.default_factory]
    if missing := [name for name in required if name not in node]:
        raise ConfigError(f"{dotted}{missing[0]}: missing; {cls.__name__} needs it")
    parts = {name: hints[name] for name in names if _is_component(hints[name])}
    values: dict[str, Any] = {
        name: _build_part(node[name], hint, f"{dotted}{name}", plugins) for name, hint in parts.items() if name in node
    }
    plain = {key: value for key, value in node.items() if key in names and key not in parts}
    for name, value in plain.items():
        for element in get_args(hints[name]):  # list[Rule] and the like
            if dataclasses.is_dataclass(element) and isinstance(value, list):
                for index, item in enumerate(value):
                    known = [field.name for field in dataclasses.fields(element)]
                    _check_keys(item if isinstance(item, Mapping) else {}, known, f"{dotted}{name}[{index}].")
    values |= _check_types({name: hints[name] for name in plain}, plain, dotted)
    for name in plain:
        _check_elements(values[name], hints[name], f"{dotted}{name}")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{dotted}{error}") from error


def _check_elements(value: Any, hint: Any, key: str) -> None:
    """Refuse a list within a list of numbers or texts: the library's schema lets it pass."""
    kinds = [kind for kind in get_args(hint) if kind in (int, float, str, bool)]
    if get_origin(hint) is list and kinds and any(isinstance(item, list | dict) for item in value):
        raise ConfigError(f"{key}={value!r}: must be a list of single values, as in '{key}=[…,…]'")


def _check_keys(node: Mapping[str, Any], known: Sequence[str], dotted: str) -> None:
    for key in node:
        if key not in known:
            names = [name for name in known if name != "_target_"]
            hint = remedy(str(key), str(node[key])) if not dotted and "loop" in known else ""
            raise ConfigError(f"{dotted}{key}: no such key{hint or suggest(str(key), names, dotted)}")


@contextmanager
def naming(group: str) -> Iterator[None]:
    """Put ``group.`` before an error that starts with a bare key, as a component's own checks make them."""
    try:
        yield
    except ValueError as error:
        key = re.match(rf"(?!{group}\b)(\w+)(\[\d+\])?(\.\w+)?=", str(error))
        if key and not (key[3] and (conf_dir() / key[1]).is_dir()):  # another group's key has its name already
            raise ConfigError(f"{group}.{error}") from error
        raise


def _build_part(node: Any, base: type, path: str, plugins: Sequence[str]) -> Any:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{path}={node!r}: an option of this group is needed, with its _target_")
    return build(node, base, path=path, plugins=plugins)


def _is_component(hint: Any) -> bool:
    return isinstance(hint, type) and (inspect.isabstract(hint) or dataclasses.is_dataclass(hint))


def _find_class(target: Any, base: type[T], path: str, plugins: Sequence[str]) -> type[T]:
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{path or 'config'}._target_={target!r}: must name a dataclass, as in package.module.Class")
    allowed = ("llmtrain", *plugins)
    if target.split(".")[0] not in allowed:
        raise ConfigError(
            f"{path or 'config'}._target_={target}: not a class of llmtrain; "
            f"if you trust it, name its package: plugins=[{target.split('.')[0]}]"
        )
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):  # the module exists and imports one that does not
            raise
        raise ConfigError(f"{path or 'config'}._target_={target}: there is no module {module_name}") from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module_name):
        raise ConfigError(f"{path or 'config'}._target_={target}: not a dataclass defined in {module_name}")
    if not issubclass(cls, base):
        raise ConfigError(
            f"{path or 'config'}._target_={target}: not a {base.__module__}.{base.__name__}, which this place needs"
        )
    return cls


def _check_types(hints: Mapping[str, Any], values: Mapping[str, Any], dotted: str) -> dict[str, Any]:
    """``values`` converted to their annotated types."""
    values = {name: _whole(hints[name], value) for name, value in values.items()}
    try:
        merged = OmegaConf.merge(_schema(tuple(hints.items())), escape(dict(values)))
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None) or ""
        top = re.split(r"[.\[]", str(key))[0]
        wanted = _wanted(f"{dotted}{key}", hints[key], values[key]) if key in values else None
        reason = wanted or str(error).splitlines()[0]
        shown = f"={values[top]!r}" if top in values else ""
        raise ConfigError(f"{dotted}{key}{shown}: {reason}") from error
    except ValueError as error:  # a nested dataclass' own check
        raise ConfigError(f"{dotted.rstrip('.')}: {error}" if dotted else str(error)) from error
    return {name: getattr(built, name) for name in hints}


@cache
def _schema(hints: tuple[tuple[str, Any], ...]) -> DictConfig:
    """Return a config without values, of the given types; making one takes longer than checking values by it."""
    fields = [(name, hint, dataclasses.MISSING) for name, hint in hints]
    schema: DictConfig = OmegaConf.structured(dataclasses.make_dataclass("Schema", fields))
    return schema


def _whole(hint: Any, value: Any) -> Any:
    """A whole number that was written as another one, 1e3, for a key that takes an int."""
    kinds = get_args(hint) or (hint,)
    is_whole = isinstance(value, float) and int in kinds and float not in kinds and value.is_integer()
    return int(value) if is_whole else value


def _wanted(key: str, hint: Any, value: Any) -> str | None:
    """Words for the values that the type ``hint`` allows; None where the library's message is as good."""
    alternatives = [kind for kind in get_args(hint) if kind is not NoneType] if isinstance(hint, UnionType) else [hint]
    (kind, *others) = alternatives
    if others:
        return None
    if get_origin(kind) is list:
        items = [part.strip() for part in value.split(",")] if isinstance(value, str) else ["…"]
        words = f"must be a list, in brackets: '{key}=[{','.join(items)}]'"
    elif isinstance(kind, type) and issubclass(kind, Enum):
        names = [item.name for item in kind]
        words = f"must be one of {', '.join(names)}{did_you_mean(str(value), names)}"
    else:
        words = {bool: "must be true or false", int: "must be a whole number", str: "must be a text",
                 float: "must be a number, as in 0.1 or 3e-4"}.get(kind, "")  # fmt: skip
    return words and words + "; or null" * (len(get_args(hint)) > 1 and kind is not hint)


def suggest(key: str, known: Sequence[str], dotted: str = "") -> str:
    """The end of a message about an unknown key: the nearest known name, or all of them."""
    if nearest := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"; did you mean {dotted}{nearest[0]}?"
    return f"; there are: {', '.join(known)}" if known else ""
