"""The folders of the config groups and of the sample data, installed or in a checkout."""

import importlib
from pathlib import Path


def conf_dir() -> Path:
    """The directory of the config groups."""
    return _installed("conf", "conf")


def sample(name: str) -> str:
    """The path of a file of the sample data, as recipes name it: ``${sample:messages.csv}``."""
    return str(_installed("samples", "data") / name)


def _installed(package: str, folder: str) -> Path:
    """A directory that is installed with the package, or lies beside it in a checkout."""
    try:
        return Path(next(iter(importlib.import_module(f"llmtrain.{package}").__path__))).resolve()
    except ModuleNotFoundError:
        return Path(__file__).resolve().parents[2] / folder
