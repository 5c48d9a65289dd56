"""Fixtures that every part uses: nothing of the user's machine is touched; a GPU is only for ``pytest -m gpu``."""

import gc
import os
import re
from pathlib import Path

import pytest

# Before torch is imported, as llmtrain.base.process.prepare_process does: threads that wait for one another soon go to
# sleep.  Workers of pytest -n that spin on the same cores are many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tests.helpers import quick

TEXT = Path(__file__).parent.parent / "data"
CORES = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 2)  # what tests may use at most
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from this process and its subprocesses, unless tests marked gpu are asked for.

    Tests that compare bits, or a CPU's kernels, then hold on every machine.  torch has not looked for a GPU yet.
    """
    quick.install()
    if not wants_gpu(config.option.markexpr):
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            os.environ[name] = ""


def wants_gpu(markers: str) -> bool:
    """Return whether the expression of ``-m`` selects tests marked gpu."""
    return re.search(r"(?<!not )\bgpu\b", markers) is not None


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache of data and of compiled code for the test session, not the user's."""
    folder = tmp_path_factory.getbasetemp()
    cache = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    os.environ["LLMTRAIN_CACHE"] = str(cache)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "compiled")


@pytest.fixture(autouse=True)
def share_of_the_cores() -> None:
    """All workers together have as many threads as there are cores; what needs two threads says so."""
    torch.set_num_threads(max(CORES // WORKERS, 1))


@pytest.fixture
def drawn_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots that this process saves are drawn."""
    monkeypatch.setattr(FigureCanvasAgg, "print_png", quick._print_png)


def pytest_collection_finish() -> None:
    """What was imported is there to stay: looking through it for garbage, again and again, would take a fifth of a
    second each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
