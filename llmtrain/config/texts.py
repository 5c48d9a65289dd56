"""Values as they were typed: texts with characters that have a meaning in Hydra's grammar are quoted for it.

A path, a name, a prompt may hold brackets, commas, ``=``, ``#``, quotes, ``${…}``, letters of any script.  Overrides
that Hydra reads as they are stay as they are; so do quoted values, ``null``, lists, sweeps and interpolations of keys
that are no prompts.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import grammar_parser
from omegaconf.errors import GrammarParseError

from llmtrain.base.files import exists
from llmtrain.config.folders import conf_dir
from llmtrain.config.key_types import is_list_of_texts, is_text, may_be_null, types_of
from llmtrain.config.overrides import key_of
from llmtrain.config.stored_config import ConfigError, escape

# Texts that are never sweeps, references or quoted for Hydra: what a person says, or a model.
PROSE = ("prompt", "text", "system", "template", "loop.sample_prompt", "data.system", "data.template", "data.separator")
SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)
PAIRS = {"[": "]", "{": "}", "(": ")"}


def as_typed(verb: str, overrides: Sequence[str], *, multirun: bool = False) -> list[str]:
    """Return ``overrides`` in Hydra's grammar, each with the value that was typed.  Raises :class:`ConfigError`."""
    return [_override(verb, override, multirun) for override in with_length(overrides)]


def with_length(overrides: Sequence[str]) -> list[str]:
    """Return ``overrides`` in which a length in tokens takes the place of one in steps or epochs that was not given."""
    values = {key_of(override): override.partition("=")[2] for override in overrides}
    if values.get("loop.max_tokens", "null") == "null":
        return list(overrides)
    return [*overrides, *(f"{key}=null" for key in ("loop.max_steps", "loop.epochs") if key not in values)]


def _override(verb: str, override: str, multirun: bool) -> str:
    written, equals, value = override.partition("=")
    key = key_of(override)
    if not equals or key.startswith("hydra"):
        return override
    if "." not in key and key.isidentifier() and (conf_dir() / key).is_dir():
        return f"{written}={_option(key, value)}"
    if is_text(verb, key):
        if value == "???":
            raise ConfigError(f"{key}=???: these three characters stand for a missing value; another text is needed")
        return f"{written}={_text(verb, key, value, multirun)}"
    if is_list_of_texts(verb, key):
        return f"{written}={_list(verb, key, value, multirun)}"
    if parsed(f"x={value}") is not None:
        return override
    if any(annotation.startswith(("list", "dict")) for annotation in types_of(verb, key)):
        if not _balanced(value):
            raise ConfigError(f"{key}={value}: a bracket or a quote in it is not closed; as in '{key}=[…]'")
        raise ConfigError(
            f"{key}={value}: cannot be read; texts in it that have brackets, commas, colons or quotes must be quoted, "
            f"as in '{key}=[{{pattern:\"a(b|c)\"}}]'"
        )
    return f"{written}={quote(value, literal=not is_reference(value))}"


def _option(group: str, value: str) -> str:
    """Return the choice of an option in Hydra's grammar.  Raises :class:`ConfigError` for several at once."""
    override = parsed(f"x={value}")
    if override is None:
        return quote(value)
    if isinstance(override._value, list) and len(override._value) > 1:
        if group == "metrics":
            remedy = "metrics=tensorboard writes metrics.jsonl as well, as metrics=local does"
        else:
            remedy = f"a run of each is a sweep: -m {group}={','.join(map(str, override._value))}"
        raise ConfigError(f"{group}={value}: a run has one option of this group; {remedy}")
    if isinstance(override._value, list):
        if not override._value or not all(isinstance(item, str) for item in override._value):
            raise ConfigError(f"{group}={value}: takes the name of an option, not a list; --help shows the options")
        return override._value[0]
    if not override.is_sweep_override():
        return value if isinstance(override._value, str | QuotedString) else quote(value)
    if SWEEP_FUNCTION.fullmatch(value):
        return value
    return ",".join(_option(group, choice.strip()) for choice in _choices(value) or [])


def _text(verb: str, key: str, value: str, multirun: bool) -> str:
    """Return the value of a text in Hydra's grammar."""
    prose = key in PROSE
    override = parsed(f"x={value}")
    if value == "null" and may_be_null(verb, key):
        return value
    if multirun and (choices := _choices(value)) is not None and (not prose or all(map(is_quoted, choices))):
        if SWEEP_FUNCTION.fullmatch(value):
            return value
        if not exists(value):
            return ",".join(_text(verb, key, choice, False) for choice in choices)
    if is_quoted(value):
        return quote(content(value)) if prose else value
    if prose or exists(value):
        return quote(value)
    if "${" in value and is_reference(value):
        return value if override is not None and _plain(override) == value else quote(value, literal=False)
    if override is not None and not override.is_sweep_override() and isinstance(override._value, str):
        typed_exists = override._value == value or not exists(override._value)
        return quote(value) if typed_exists and override._value != value else value
    if multirun and override is None and "," in value and not _balanced(value):
        raise ConfigError(
            f"{key}={value}: with -m a comma separates values, and this one cannot be split; quote each value, as in "
            f'\'{key}="a [1","b"\', or all of it as one: {shown(key, value)}'
        )
    return quote(value)


def _list(verb: str, key: str, value: str, multirun: bool) -> str:
    """Return a list of texts in Hydra's grammar: each item as it was typed."""
    if multirun and (choices := _choices(value)) is not None and not SWEEP_FUNCTION.fullmatch(value):
        return ",".join(_list(verb, key, choice.strip(), False) for choice in choices)
    if not (value.startswith("[") and value.endswith("]")):
        return value if parsed(f"x={value}") is not None else quote(value)
    inner = value[1:-1]
    items = [item.strip() for item in _split(inner)] if inner.strip() else []
    if any(not item for item in items):
        raise ConfigError(f"{key}={value}: an item of the list is empty; '{key}=[{','.join(filter(None, items))}]'")
    return f"[{','.join(map(_item, items))}]"


def _item(item: str) -> str:
    override = parsed(f"x={item}")
    if is_quoted(item) or ("${" in item and is_reference(item)) or (override is not None and _plain(override) == item):
        return item
    return quote(item)


def parsed(override: str) -> Override | None:
    """Parse an override with Hydra; None where its grammar does not allow it."""
    with suppress(HydraException, RecursionError):
        return _parser().parse_override(override)
    return None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _plain(override: Override) -> Any:
    return None if override.is_sweep_override() or isinstance(override._value, QuotedString) else override._value


def is_quoted(value: str) -> bool:
    """Return whether Hydra reads ``value`` as one quoted text."""
    if value[:1] not in ("'", '"'):
        return False
    override = parsed(f"x={value}")
    return override is not None and isinstance(override._value, QuotedString)


def content(value: str) -> str:
    """Return the text between the quotes of a quoted value."""
    override = parsed(f"x={value}")
    assert override is not None
    return str(override.value())


def quote(value: str, *, literal: bool = True) -> str:
    """Quote a text for Hydra; if ``literal``, a ``${`` in it refers to nothing."""
    if not literal and "'" in value and '"' not in value:  # no escape is read inside of a reference
        return f'"{value}"'
    text = escape(value) if literal else value
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f"'{text}'"


def shown(key: str, value: str) -> str:
    """Write an override with a text in quotes for Hydra, and for a shell."""
    return shlex.quote(f"{key}={quote(value)}")


def is_reference(value: str) -> bool:
    """Return whether OmegaConf can read the ``${…}`` in ``value`` as references."""
    try:
        grammar_parser.parse(value)
    except (GrammarParseError, RecursionError):
        return False
    return re.search(r"\$\{[^}]", value) is not None


def _choices(value: str) -> list[str] | None:
    """Split the values of a sweep, as in ``a,b``; None for a single value."""
    if SWEEP_FUNCTION.fullmatch(value) and parsed(f"x={value}") is not None:
        return [value]
    choices = _split(value) if _balanced(value) else []
    return choices if len(choices) > 1 and all(choice.strip() for choice in choices) else None


def _split(text: str) -> list[str]:
    """Split at the commas outside of quotes and brackets."""
    parts, begin = [], 0
    for position, depth in _depths(text):
        if depth == 0 and text[position] == ",":
            parts.append(text[begin:position])
            begin = position + 1
    return [*parts, text[begin:]]


def _balanced(text: str) -> bool:
    """Return whether every bracket and quote of ``text`` is closed."""
    return ([depth for _, depth in _depths(text)] or [0])[-1] == 0


def _depths(text: str) -> Iterator[tuple[int, int]]:
    """The positions of ``text``, each with the number of brackets and quotes that are open behind it."""
    stack: list[str] = []
    for position, character in enumerate(text):
        if stack and character == stack[-1] and not (character in "'\"" and text[position - 1] == "\\"):
            stack.pop()
        elif not (stack and stack[-1] in "'\""):
            if character in PAIRS:
                stack.append(PAIRS[character])
            elif character in "'\"" and (position == 0 or text[position - 1] in ",[{(: "):
                stack.append(character)
        yield position, len(stack)
