"""Overrides as the user gave them."""

import re
from collections.abc import Sequence
from pathlib import Path

CONFIG_DIR = ("--config-dir", "-cd")


def overrides_of(command: Sequence[str]) -> list[str]:
    """The overrides of a command line, and the folder of ``--config-dir`` as the override that it stands for."""
    overrides = [argument for argument in command if re.match(r"\+{0,2}[a-zA-Z_][\w./@]*=", argument)]
    for position, argument in enumerate(command):
        flag, equals, folder = argument.partition("=")
        if flag in CONFIG_DIR and (equals or position + 1 < len(command)):
            overrides.append(search_path(folder or command[position + 1]))
    return overrides


def key_of(override: str) -> str:
    """The key that an override changes, without its sign: ``++optimizer.lr=1`` changes ``optimizer.lr``."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0].replace("/", ".")


def search_path(folder: str | Path) -> str:
    """The override that ``--config-dir`` stands for."""
    path = str(Path(folder).resolve())
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", path)
    return f"hydra.searchpath=['file://{escaped}']"
