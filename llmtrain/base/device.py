"""The device of this machine: its name, its memory and its speed."""

from __future__ import annotations

import functools
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.base.gpus import find_gpu
from llmtrain.base.process import nvidia_gpus

if TYPE_CHECKING:
    import torch


def device_name(device: torch.device) -> str:
    """Name ``device`` for people: "NVIDIA H100 80GB HBM3", "CPU, AMD EPYC …, 2 threads"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"CPU, {name}, {threads} thread{'s' * (threads != 1)}"


def missing_cuda_reason() -> str | None:
    """Say that torch cannot use the NVIDIA GPU of this machine, and the reason; None where there is none to be used."""
    import torch

    if torch.cuda.is_available() or not nvidia_gpus():
        return None
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} was installed without CUDA; a build of "
            "torch with CUDA would use it"
        )
    return (
        f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it, as with a driver that is older "
        f"than its CUDA {torch.version.cuda}; nvidia-smi shows the driver's"
    )


def unused_gpu_reason() -> str | None:
    """Say that a run which takes the best device trains on the CPU though there is a GPU; None where there is none."""
    import torch

    if reason := missing_cuda_reason():
        return f"training on the CPU: {reason}"
    if torch.backends.mps.is_available():
        return "training on the CPU: torch sees an Apple GPU (mps), which this program does not use"
    if torch.xpu.is_available():
        return "training on the CPU: torch sees an Intel GPU (xpu), which this program does not use"
    return None


def device_type(tensor: torch.Tensor) -> str:
    """Return the type of the device that ``tensor`` is on, or stands for.

    A plan traces a step on tensors without data, on a CPU whatever the device planned for; their ``fake_mode`` has the
    type of that device as ``planned_for``.
    """
    import torch

    if torch.compiler.is_compiling():  # the compiler has a mode of its own
        return tensor.device.type
    return getattr(getattr(tensor, "fake_mode", None), "planned_for", None) or tensor.device.type


def has_no_data(tensor: torch.Tensor) -> bool:
    """Return True for a tensor on which a plan traces a step: it has a shape, and no values."""
    return getattr(tensor, "fake_mode", None) is not None


def has_native_bf16(device: torch.device) -> bool:
    """Return True if ``device`` multiplies bf16 in hardware (on a CPU: AVX512-BF16 or AMX, not emulation)."""
    import torch

    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: allocated on a GPU, resident in this process on a CPU."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would start from the peak of the parent process
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return 1024 * int(peaks[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Return the bytes of host memory that this process can still take; None if unknown.

    The limit is the kernel's or that of the process's control group, whichever is lower.
    """
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        kilobytes = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
        found += [1024 * int(number) for number in kilobytes]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        found.append(int(limit) - int((group / "memory.current").read_text()))
    return min(found) if found else None


@dataclass(frozen=True)
class PeakRate:
    """The FLOP/s that 100% MFU stands for, and their source."""

    flops: float
    source: str  # the reason for the number, where it is not the data sheet's of the run's own precision


def peak_rate(device: torch.device, precision: str, dtype: torch.dtype) -> PeakRate:
    """Return the rate of dense matrix products of the run: on a GPU of the table its data sheet's for ``precision``.

    Elsewhere products in ``dtype`` are measured, within some tens of milliseconds.  fp8 on a GPU that the table lacks
    is measured in bf16, the ``dtype`` beside its 8-bit products.
    """
    import torch

    source = ""
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        if gpu is not None and precision in gpu.flops:
            return PeakRate(gpu.flops[precision], source)
        source = "measured in bf16" if precision == "fp8" else "measured"
    flops = _measured_flops(device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())
    return PeakRate(flops, source)


@functools.cache
def _measured_flops(device: torch.device, dtype: torch.dtype, num_threads: int, float32_precision: str) -> float:
    """Measure once in a process, so that a later run need not wait again."""
    return measure_matmul_flops(device, dtype)


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] | None = None, *,
    most: int = 16, enough_seconds: float = 0.2,
) -> float:  # fmt: skip
    """Measure the FLOP/s of the fastest of a few matrix products, within tens of milliseconds.

    ``shape``: rows, inputs and outputs of a product; None: large ones.  ``most``: products that are timed, as long as
    they take less than ``enough_seconds`` in all.  Where one would take more than a second (fp16 on a CPU), a sixteenth
    of its rows is timed instead; on a CPU that emulates ``dtype``, where a row takes tens of milliseconds, a few rows.
    """
    import torch

    m, k, n = shape or ((8192, 8192, 8192) if device.type == "cuda" else (2048, 1024, 4096))
    generator = torch.Generator(device).manual_seed(0)  # products of zeros would be faster
    a = torch.randn(m, k, device=device, generator=generator).to(dtype)
    b = torch.randn(k, n, device=device, generator=generator).to(dtype)
    product = torch.empty(
        m, n, device=device, dtype=dtype
    )  # allocated once: mapping fresh memory takes longer than the product
    for rows in (1, m // 16) if device.type == "cpu" else (m // 16,):
        torch.mm(a[:rows], b, out=product[:rows])  # one-time work, such as choosing a kernel
        start = time.perf_counter()
        torch.mm(a[:rows], b, out=product[:rows])
        if device.type == "cpu" and (time.perf_counter() - start) > (0.02 if rows == 1 else 1 / 16):
            rows = max(rows, m // 256)
            m, a, product = rows, a[:rows], product[:rows]
            break
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < most and sum(seconds) < enough_seconds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * m * k * n / min(seconds)
