"""Fixtures that every part uses: nothing of the user's machine is touched, GPU tests skip without a GPU."""

from pathlib import Path

import pytest
import torch

TEXT = Path(__file__).parent.parent / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One data cache for the test session, not the user's."""
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """As many threads as the continuous integration has cores."""
    torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
