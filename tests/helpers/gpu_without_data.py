"""Tensors without data that say that they are on a GPU, also where torch is built for CPUs only.

There most operations on them fail: torch asks a library, which is missing, to switch to the device.  A library of one
object takes its place: it switches to nothing.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}
"""


def skip_without_driver() -> None:
    """Skip the test where torch is built with CUDA and there is no GPU: it then refuses even tensors without data."""
    if torch.backends.cuda.is_built() and not torch.cuda.is_available():
        pytest.skip("torch is built with CUDA, and there is no GPU: needs a build for CPUs, or a GPU")


@functools.cache
def allow_gpu_tensors() -> None:
    """Make operations on fake tensors of a GPU possible in this process; skip the test where there is no compiler."""
    skip_without_driver()
    if torch.backends.cuda.is_built():
        return
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(SOURCE)
        subprocess.run(
            ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(source),
             f"-L{torch_folder / 'lib'}", "-lc10", "-o", str(library)],
            check=True,
        )  # fmt: skip
        ctypes.CDLL(str(library))
