"""Stored configs of older versions: classes under their former names."""

import importlib
from pathlib import Path

import pytest

from llmtrain.config import stored_config
from llmtrain.config.stored_config import MOVED


@pytest.mark.parametrize(("former", "current"), MOVED.items())
def test_former_name_is_read_as_the_current_class(former: str, current: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"group:\n  _target_: {former}\n")
    assert stored_config.load(path) == {"group": {"_target_": current}}
    module, _, name = current.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)
