"""Kernels in C++: compiled at first use, kept in the cache, loaded from there.

The cache holds code that this process will run, so only what this user or root has written there is loaded, and only if
it is whole: a library's name ends with the hash of its content.  Where the cache cannot be used, a library is compiled
for this process alone.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain.base.process import cache_folder
from llmtrain.base.trusted_files import open_trusted, private_folder, write_trusted

COMPILER = "g++"  # its OpenMP is the one that torch has loaded: kernels share torch's threads
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp")
TIMEOUT_SECONDS = 300.0
DIGEST = 32  # hexadecimal digits of the content's sha256 in the name of a library
log = logging.getLogger(__name__)


class CompilationError(OSError):
    """A kernel that cannot be compiled here; the message says why."""


def load(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Load the library that ``source`` compiles to; ``flags`` name the CPU's instructions.  torch must be loaded.

    The library is compiled again when the source, a header beside it that it includes, or the flags change.  Raises
    OSError with the reason if there is no compiler, if it fails, or if its result cannot be loaded.
    """
    flags = [*FLAGS, *flags]
    key = hashlib.sha256("\0".join([*source_texts(source), *flags]).encode()).hexdigest()
    prefix = f"{source.stem}-{key[:16]}-"
    folder = cache_folder() / "native"
    try:
        with private_folder(folder) as opened:
            if (found := find_library(opened, prefix)) is not None:
                return load_open(found)
            content = compile_library(source, flags)
            name = f"{prefix}{hashlib.sha256(content).hexdigest()[:DIGEST]}.so"
            write_trusted(opened, name, content)
            for other in libraries(opened, prefix):
                if other != name:  # damaged, or another's
                    with contextlib.suppress(OSError):
                        os.unlink(other, dir_fd=opened)
            if (found := find_library(opened, prefix)) is not None:
                return load_open(found)
            reason = "what was written there reads back differently"
    except CompilationError:
        raise
    except OSError as error:
        reason = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
    log.warning("compiled code is not kept in %s (%s), but compiled at each start", folder, reason)
    return load_private(compile_library(source, flags))


def libraries(folder: int, prefix: str) -> list[str]:
    """List the names of the opened folder's libraries that begin with ``prefix``."""
    return [name for name in os.listdir(folder) if name.startswith(prefix) and name.endswith(".so")]


def find_library(folder: int, prefix: str) -> int | None:
    """Open the library of an opened folder whose name begins with ``prefix``, if it is trusted and whole."""
    for name in libraries(folder, prefix):
        digest = name.removeprefix(prefix).removesuffix(".so")
        if len(digest) == DIGEST and (file := open_trusted(folder, name, digest)) is not None:
            return file
    return None


def load_open(file: int) -> ctypes.CDLL:
    """Load the library that ``file`` has open: by its descriptor, since its name may be another's by now.

    The descriptor stays open: the loader takes two libraries of the same name for one.
    """
    path = Path(f"/proc/self/fd/{file}")
    if path.exists():
        return ctypes.CDLL(str(path))
    with open(file, "rb") as opened:  # a system without /proc
        return load_private(opened.read())


def load_private(content: bytes) -> ctypes.CDLL:
    """Load a library from a folder that only this process has, and that is removed at once."""
    with tempfile.TemporaryDirectory(prefix="llmtrain-") as folder:
        path = Path(folder) / "kernel.so"
        path.write_bytes(content)
        return ctypes.CDLL(str(path))


def source_texts(source: Path) -> Iterator[str]:
    """Read ``source`` and the headers beside it that it includes."""
    text = source.read_text(encoding="utf-8")
    yield text
    for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE):
        yield from source_texts(source.with_name(name))


def compile_library(source: Path, flags: Sequence[str]) -> bytes:
    """Compile ``source`` in a folder of this process alone; return the library.  Raises :class:`CompilationError`."""
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise CompilationError(f"no C++ compiler ({COMPILER})")
    with tempfile.TemporaryDirectory(prefix="llmtrain-") as folder:
        compiled, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        # linked without an OpenMP library: its functions are found in the one that torch has loaded
        for command in ([compiler, *flags, "-c", str(source), "-o", str(compiled)],
                        [compiler, "-shared", str(compiled), "-o", str(linked)]):  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise CompilationError(
                    f"{COMPILER} took longer than {TIMEOUT_SECONDS:g} s for {source.name}"
                ) from error
            if done.returncode:
                message = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
                raise CompilationError(f"{COMPILER} cannot compile {source.name}: {message}")
        return linked.read_bytes()
