"""Kernels in C++: compiled once, whole or not at all."""

import shutil
from pathlib import Path

import pytest

from llmtrain.kernels.build import load

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SOURCE = """
extern "C" int threads_of(int wanted) {
    int found = 0;
#pragma omp parallel num_threads(wanted) reduction(+ : found)
    found += 1;
    return found * FACTOR;
}
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "count.cpp"
    path.write_text(SOURCE)
    return path


def test_a_kernel_is_compiled_once_for_each_set_of_flags(source: Path, tmp_path: Path) -> None:
    assert load(source, ["-DFACTOR=1"]).threads_of(3) == 3
    (first,) = (tmp_path / "cache" / "native").iterdir()
    made = first.stat().st_mtime_ns
    assert load(source, ["-DFACTOR=1"]).threads_of(2) == 2
    assert load(source, ["-DFACTOR=10"]).threads_of(2) == 20
    assert first.stat().st_mtime_ns == made
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 2


def test_an_edited_kernel_is_compiled_again(source: Path) -> None:
    assert load(source, ["-DFACTOR=1"]).threads_of(1) == 1
    source.write_text(SOURCE.replace("FACTOR", "FACTOR * 7"))
    assert load(source, ["-DFACTOR=1"]).threads_of(1) == 7


def test_a_kernel_with_an_edited_header_is_compiled_again(source: Path) -> None:
    source.write_text(f'#include "factor.h"\n{SOURCE}')
    source.with_name("factor.h").write_text("#define FACTOR 2\n")
    assert load(source, []).threads_of(1) == 2
    source.with_name("factor.h").write_text("#define FACTOR 5\n")
    assert load(source, []).threads_of(1) == 5


def test_a_failed_compilation_leaves_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text("int broken(")
    with pytest.raises(OSError, match=r"g\+\+ cannot compile count\.cpp: .*count\.cpp"):
        load(source, [])
    assert not list((tmp_path / "cache" / "native").iterdir())


def test_a_missing_compiler_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"no C\+\+ compiler \(g\+\+\)"):
        load(source, [])
