"""Fixtures of the fault tests: a launcher of victims, and the end that an undisturbed run comes to."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.victims import STANDARD, prepare
from tests.helpers.launcher import Launcher

if sys.platform != "linux":  # /proc, prlimit, the death of a parent
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """One for all tests of the session."""
    with Launcher(prepare(tmp_path_factory.mktemp("faults"))) as launcher:
        yield launcher


@pytest.fixture(scope="session")
def undisturbed(server: Launcher) -> Path:
    """The run that all disturbed ones are compared with."""
    server.run("train", *STANDARD, "run_dir=whole")
    return server.folder / "whole"


@pytest.fixture
def launcher(server: Launcher, tmp_path: Path) -> Iterator[Launcher]:
    """The launcher, to start victims in a folder of the test's own."""
    before, server.folder = server.folder, prepare(tmp_path)
    yield server
    server.folder = before
