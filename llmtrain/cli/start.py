"""The start of the program: malloc is set up as the command line asks before anything heavy is imported.

glibc reads its tunables before Python runs, so that the choice cannot wait for the composed config.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from llmtrain.base.process import Allocator, restart_with_tunables, restart_without_tunables
from llmtrain.base.run_files import CONFIG
from llmtrain.base.stored_files import read_text_file

TRAINING = ("train", "resume", "plan", "verify")  # verbs that do training steps
OF_A_RUN = ("resume", "verify")  # verbs whose target has a stored config
SHOWING = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i")  # flags under which nothing is done


def restart_if_needed(arguments: Sequence[str]) -> None:
    """Restart the program, in the same process, if its verb trains and malloc is not as it should be."""
    verb, rest = split_verb(arguments)
    if verb not in TRAINING or any(argument.partition("=")[0] in SHOWING for argument in rest):
        return
    if requested_allocator(verb, rest) is Allocator.tuned:
        restart_with_tunables()
    else:
        restart_without_tunables()


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split the verb from the other arguments; ``--debug`` may stand anywhere and is left out."""
    verb, *rest = [argument for argument in arguments if argument != "--debug"] or [""]
    return verb, rest


def requested_allocator(verb: str, arguments: Sequence[str]) -> Allocator:
    """Find ``runtime.allocator`` on the command line, else in the stored config of a target; tuned or system."""
    device = _requested("device", verb, arguments) or "auto"
    return Allocator.named(_requested("allocator", verb, arguments)).resolve(device)


def _requested(key: str, verb: str, arguments: Sequence[str]) -> str | None:
    """Find the value of ``key`` of the group ``runtime``; ``verify`` has a ``device`` of its own."""
    name = key if (verb, key) == ("verify", "device") else rf"\+{{0,2}}runtime\.{key}"
    matches = [re.fullmatch(rf"{name}=['\"]?([\w:]+)['\"]?", argument) for argument in arguments]
    values = [match[1] for match in matches if match]
    if not values and verb in OF_A_RUN and name != key:
        values = [value for argument in arguments if (value := _stored(key, Path(argument) / CONFIG))]
    return values[-1] if values else None


def _stored(key: str, config: Path) -> str | None:
    """Find the value in a stored config without a YAML parser: a run writes two spaces and one key a line."""
    try:
        text = read_text_file(config)
    except (OSError, ValueError):
        return None
    found = re.search(rf"^runtime:\n(?:[ #].*\n|\n)*?  {key}: *['\"]?([\w:]+)", text, re.MULTILINE)
    return found[1] if found else None
