"""Kernels in C++: compiled once, whole or not at all."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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


def damage_cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def damage_exchanged(file: Path) -> None:
    """A library that somebody else compiled, in the place of ours."""
    evil = file.with_name("evil.cpp")
    evil.write_text(SOURCE.replace("found * FACTOR", "666"))
    subprocess.run(["g++", "-shared", "-fPIC", "-DFACTOR=1", str(evil), "-o", str(file)], check=True)


def damage_writable(file: Path) -> None:
    damage_exchanged(file)
    file.chmod(0o666)


@pytest.mark.parametrize("damage", [damage_cut, damage_exchanged, damage_writable])
def test_a_torn_or_exchanged_library_is_compiled_again(
    source: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Loading a torn one would end the process with SIGBUS; so this is tried in another process."""
    code = (
        "import ctypes, sys\nctypes.CDLL('libgomp.so.1', ctypes.RTLD_GLOBAL)\n"  # torch's, which is slow to import
        "from pathlib import Path\nfrom llmtrain.kernels.build import load\n"
        "print(load(Path(sys.argv[1]), ['-DFACTOR=1']).threads_of(1))"
    )
    load(source, ["-DFACTOR=1"])
    (file,) = (tmp_path / "cache" / "native").iterdir()
    damage(file)
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    (made,) = (tmp_path / "cache" / "native").glob("*.so")
    assert hashlib.sha256(made.read_bytes()).hexdigest()[:32] in made.name


@pytest.mark.parametrize("place", ["file", "link"])
def test_without_a_usable_cache_a_kernel_is_compiled_for_the_process(
    source: Path, tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    if place == "file":
        (tmp_path / "cache" / "native").touch()
    else:
        (tmp_path / "cache" / "native").symlink_to(tmp_path / "elsewhere")
    assert load(source, ["-DFACTOR=3"]).threads_of(1) == 3
    assert "native: a link or a file" in caplog.text
    assert not list((tmp_path / "elsewhere").iterdir())
