"""Kernels in C++: compiled at first use, kept in the cache, loaded from there."""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain.base.process import cache_folder

COMPILER = "g++"  # its OpenMP is the one that torch has loaded: kernels share torch's threads
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp")
TIMEOUT_SECONDS = 300.0


def load(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Load the library that ``source`` compiles to; ``flags`` name the CPU's instructions.  torch must be loaded.

    The library is compiled again when the source, a header beside it that it includes, or the flags change.  Raises
    OSError with the reason if there is no compiler, if it fails, or if its result cannot be loaded.
    """
    flags = [*FLAGS, *flags]
    key = hashlib.sha256("\0".join([*source_texts(source), *flags]).encode()).hexdigest()
    library = cache_folder() / "native" / f"{source.stem}-{key[:16]}.so"
    if not library.exists():
        compile_library(source, flags, library)
    return ctypes.CDLL(str(library))


def source_texts(source: Path) -> Iterator[str]:
    """Read ``source`` and the headers beside it that it includes."""
    text = source.read_text(encoding="utf-8")
    yield text
    for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE):
        yield from source_texts(source.with_name(name))


def compile_library(source: Path, flags: Sequence[str], library: Path) -> None:
    """Compile ``source`` into ``library``, whole or not at all.  Raises OSError."""
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise OSError(f"no C++ compiler ({COMPILER})")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=library.parent) as folder:
        compiled, linked = Path(folder) / "kernel.o", Path(folder) / library.name
        # linked without an OpenMP library: its functions are found in the one that torch has loaded
        for command in ([compiler, *flags, "-c", str(source), "-o", str(compiled)],
                        [compiler, "-shared", str(compiled), "-o", str(linked)]):  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise OSError(f"{COMPILER} took longer than {TIMEOUT_SECONDS:g} s for {source.name}") from error
            if done.returncode:
                message = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
                raise OSError(f"{COMPILER} cannot compile {source.name}: {message}")
        linked.replace(library)
