"""Words of a command line that cannot be meant as they stand, each with what was probably meant."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from llmtrain.base.files import exists
from llmtrain.base.run_files import CONFIG
from llmtrain.config.suggestions import RECIPE, REMEDIES, TRAINING, keys_named, options_named, remedy

NAME = re.compile(r"[A-Za-z_][\w./]*")


class UsageError(ValueError):
    """A mistake in the command line itself."""


def refuse_unreadable(arguments: Sequence[str]) -> None:
    """Refuse arguments that are empty, or that are no text."""
    for position, argument in enumerate(arguments, start=1):
        if not argument.strip():
            raise UsageError(
                f"argument {position} is {argument!r}, no word; a variable of the shell may be empty; "
                "an empty value is written key="
            )
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UsageError(
                f"{argument}: argument {position} is not UTF-8, and could not be stored; if it is the name of a file, "
                "rename the file, or name one that links to it"
            )


def refuse_spaces(words: Sequence[str]) -> None:
    """Refuse spaces around ``=``."""
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        key = value = ""
        if word == "=" and NAME.fullmatch(before):
            key, value = before, after
        elif word.startswith("=") and NAME.fullmatch(before) and not exists(before):
            key, value = before, word.removeprefix("=")
        elif NAME.fullmatch(word.removesuffix("=")) and word.endswith("=") and not exists(after):
            is_word = after and "=" not in after and not after.startswith("-")
            key, value = (word.removesuffix("="), after) if is_word and not exists(word) else ("", "")
        if key:
            spaced = " ".join(filter(None, (key, "=", value)))
            raise UsageError(f"{spaced}: there is no space around =; {key}={written(value)}")
    if lone := next((word for word in words if word.startswith("=") and not exists(word)), None):
        raise UsageError(f"{lone}: has no key; key=value, as in optimizer.lr=1e-3")


def stray(verb: str, word: str, others: Sequence[str]) -> str:
    """Return the message for a word of a verb that takes no directory: neither key=value nor a flag."""
    value = others[0] if others else ""
    if word in REMEDIES and verb in TRAINING:
        return f"{' '.join(filter(None, (word, value)))}: = is missing, and there is no such key{remedy(word, value)}"
    if keys := keys_named(verb, word):
        examples = " or ".join(f"{key}={written(value) if value else '…'}" for key in keys)
        return f"{' '.join(filter(None, (word, value)))}: = is missing; {examples}"
    if options := options_named(word):
        return f"{word}: an option of a group; {' or '.join(options)}"
    if exists(Path(word) / CONFIG):
        shown = shlex.quote(word)
        return (
            f"{word}: a run; to continue it: llmtrain resume {shown}; a new run like it: llmtrain train --from {shown}"
        )
    if Path(word).suffix in (".yaml", ".yml"):
        return f"{word}: neither key=value nor a flag; {RECIPE}"
    if exists(word):
        return f"{word}: neither key=value nor a flag; to train on it: data=text data.path={written(word)}"
    return f"{word}: neither key=value nor group=option nor a flag"


def written(value: str) -> str:
    """Write a value for a shell."""
    return shlex.quote(value)
