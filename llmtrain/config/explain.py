"""Errors of composing a config, in words for the user."""

import re
import shlex
from collections.abc import Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from llmtrain.base.files import exists
from llmtrain.config.folders import conf_dir
from llmtrain.config.overrides import key_of
from llmtrain.config.suggestions import RECIPE, key_hint, names_hint
from llmtrain.config.texts import parsed, shown

PLACES = {  # groups whose option is sometimes given as a file or directory: what is meant, and how that is written
    "data": ("to train on a file", "data=text data.path="),
    "model": ("for the model of a published directory", "model=auto weights=huggingface weights.path="),
    "weights": ("for published weights", "weights=huggingface weights.path="),
    "tokenizer": ("for a tokenizer's directory", "tokenizer=huggingface tokenizer.path="),
}

# Values that turn a setting on or off, and the options that do; true: the option of the group's own name.
SWITCHES = {"true": ("on", "true"), "false": ("off", "none"), "null": ("none", "off")}


def explain_composition(error: BaseException, verb: str, arguments: Sequence[str] = ()) -> str | None:
    """Return the message for an error of Hydra's or OmegaConf's, after these arguments; None for any other."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        return explain_option(error.missing_cfg_file or "", error.options)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain_override(error, verb, arguments)
    return None


def explain_option(config_file: str, options: Sequence[str]) -> str:
    """Return the message for an option that its group does not have."""
    group, _, option = config_file.partition("/")
    is_path = exists(option) or "." in option or "/" in option
    if group in PLACES and is_path:
        what, remedy = PLACES[group]
        return f"{group}={option}: no such option; {what}: {remedy}{shlex.quote(option)}"
    if group == "experiment" and is_path:
        return f"{group}={option}: no such option; {RECIPE}"
    switch = SWITCHES.get("true" if option.isdecimal() else option.lower(), ())
    meant = [name for name in (group if name == "true" else name for name in switch) if name in options]
    hint = f"; did you mean {meant[0]}? there are: {', '.join(sorted(options))}" if meant else ""
    return f"{group}={option}: no such option{hint or names_hint(option, sorted(options))}"


def explain_override(error: BaseException, verb: str, arguments: Sequence[str] = ()) -> str:
    """Return the message for an override that Hydra or OmegaConf refuses."""
    key = find_key(error)
    if key is not None:
        value = next((word.partition("=")[2] for word in arguments if "=" in word and key_of(word) == key), "")
        return f"{key}: no such key{key_hint(key, verb, value)}"
    if isinstance(error, OverrideParseException):
        return explain_grammar(error.override)
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    if match := re.match(r"Could not delete from config. '(.*)' does not exist", message):
        return f"~{match[1]}: no such key{key_hint(match[1], verb)}"
    if match := re.match(r"(\S+) appears more than once in the final defaults list", message):
        return f"+{match[1]}: the group has an option already; without the +: {match[1]}=OPTION"
    if match := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'$", message):
        key, value = match[1], match[2]
        if key.isidentifier() and (conf_dir() / key).is_dir():
            return f"{key}={value}: several options, and a run has one; a run of each is a sweep: -m {key}={value}"
        return (
            f"{key}={value}: several values; if it takes a list: '{key}=[{value}]'; if each value is a run of its "
            f"own, a sweep: -m; if it is one text with a comma: '{key}=\"{value}\"'"
        )
    return message


def explain_grammar(override: str) -> str:
    """Return the message for an override that is outside of Hydra's grammar."""
    key, _, value = override.partition("=")
    if parsed(f"x={value}") is not None:
        return f"{override}: {key!r} is no key; key=value, as in optimizer.lr=1e-3"
    return f"{override}: cannot be read; a text with such characters is written in quotes: {shown(key, value)}"


def find_key(error: BaseException | None) -> str | None:
    """Find the key that Hydra or OmegaConf does not know; None if the error has another cause."""
    while error is not None:
        if match := re.search(r"Key '([^']+)' is not in struct(?:.*?full_key: (\S+))?", str(error), re.DOTALL):
            return match[2] or match[1]
        if match := re.search(r"Could not override '([^']+)'", str(error)):
            return match[1]
        error = error.__cause__
    return None
