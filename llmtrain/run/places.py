"""The places that a stored config names, as they are now.

A run moves, or is used from another folder: relative paths are then looked for in the folder that the run was started
in, its base and its data also where they lie to the run as before, and the user may name the present place of its base
or tokenizer.
"""

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.base.run_files import ENVIRONMENT
from llmtrain.base.run_records import read_environment
from llmtrain.run.tokenizer_copy import run_of

# Keys by group, whose values are paths of files that a run reads.
READ = {
    "data": ("path", "validation_path"),
    "tokenizer": ("path", "encoding"),
    "weights": ("path",),
    "lora": ("path",),
}


DATE = re.compile(r"\d{4}-\d\d-\d\d")  # the folder of a day's runs in output_dir
MOVES_ALONG = ("data", "weights", "lora")  # fingerprints tell that they are the same


def find_places(stored: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The stored config of the run or checkpoint in ``folder``, its relative paths as they are found from here.

    A path that does not exist from the working directory, and does from the folder that the run was started in, becomes
    absolute; so does one that was moved together with the run.
    """
    values = dict(stored)
    first: Path | None = None
    for group, keys in READ.items():
        node = stored.get(group)
        for key in keys:
            path = node.get(key) if isinstance(node, Mapping) else None
            if not isinstance(path, str) or not path or _is_there(path):
                continue
            first = first or _first_directory(folder)
            if first is None:
                continue
            places = [str(first / Path(path).expanduser())]
            if group in MOVES_ALONG and (beside := _beside(stored, folder, first, path)) is not None:
                places.append(beside)
            if (found := next(filter(_is_there, places), None)) is not None:
                values[group] = {**values[group], key: found}
    return values


def _beside(stored: Mapping[str, Any], folder: Path, first: Path, path: str) -> str | None:
    """The place that lies to the run in ``folder`` as ``path`` lay to it where it was made, started in ``first``."""
    run_dir = run_of(folder)
    if run_dir is None:
        return None
    now = run_dir.absolute()
    made, output_dir = stored.get("run_dir"), stored.get("output_dir")
    if made is None and isinstance(output_dir, str) and DATE.fullmatch(now.parent.name):
        made = str(Path(output_dir, now.parent.name, now.name))
    if not isinstance(made, str):
        return None
    before = first / Path(made).expanduser()
    return os.path.normpath(now / os.path.relpath(first / Path(path).expanduser(), before))


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists() or bool(glob.has_magic(path) and glob.glob(path, recursive=True))  # noqa: PTH207 - pathlib takes no absolute pattern
    except (OSError, ValueError):  # a name that no file can have
        return False


def _first_directory(folder: Path) -> Path | None:
    """The working directory in which the run was started; None for a run of an older version."""
    run_dir = run_of(folder)
    environment = None if run_dir is None else read_environment(run_dir / ENVIRONMENT)
    directory = (environment or {}).get("directory")
    return Path(directory) if directory else None


def move(values: Mapping[str, Any], weights: str | None, tokenizer: str | None) -> dict[str, Any]:
    """``values`` with the places of the base and of the tokenizer that the user names; None: as stored.

    Raises ValueError where the run has neither.
    """
    moved = dict(values)
    if weights is not None and isinstance(moved.get("weights"), Mapping):
        moved["weights"] = {**moved["weights"], "path": weights}
    if tokenizer is not None:
        node = moved.get("tokenizer")
        key = next((key for key in READ["tokenizer"] if isinstance(node, Mapping) and key in node), None)
        if key is None:
            raise ValueError(f"tokenizer.path={tokenizer}: the tokenizer of this run is made of no files; leave it out")
        moved["tokenizer"] = {**moved["tokenizer"], key: tokenizer}
    return moved
