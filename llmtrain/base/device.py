"""The device: its name, its memory and its speed."""

from __future__ import annotations

import functools
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def physical_cores() -> int:
    """Physical cores this process may run on: hyper-threads only get in one another's way in matrix products."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)


def device_name(device: torch.device) -> str:
    """For people: "NVIDIA H100 80GB HBM3", "CPU, AMD EPYC …, 2 threads"."""
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
    return f"CPU, {name}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: allocated on a GPU, resident in this process on a CPU."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # the kernel's getrusage begins with the peak of the process that started this one
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return 1024 * int(peaks[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Bytes of host memory that this process can still take, by the kernel and its control group; None if unknown."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        kilobytes = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
        found += [1024 * int(number) for number in kilobytes]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        found.append(int(limit) - int((group / "memory.current").read_text()))
    return min(found) if found else None


# Dense bf16 matrix products without sparsity, FLOP/s, from the makers' data sheets.
DATASHEET_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that 100% MFU stands for: the data sheet's for a GPU in bf16 or fp16, else measured on the spot."""
    import torch

    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for key, flops in DATASHEET_BF16.items():
            if key in name:
                return flops
    return _measured_flops(device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.cache
def _measured_flops(device: torch.device, dtype: torch.dtype, num_threads: int, float32_precision: str) -> float:
    """As :func:`measure_matmul_flops` finds it, once in a process: a later run need not wait for it again."""
    return measure_matmul_flops(device, dtype)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few matrix products; tens of milliseconds, or the time of two on a slow device."""
    import torch

    m, k, n = (8192, 8192, 8192) if device.type == "cuda" else (2048, 1024, 4096)
    generator = torch.Generator(device).manual_seed(0)  # zeros would run faster than data does
    a = torch.randn(m, k, device=device, generator=generator).to(dtype)
    b = torch.randn(k, n, device=device, generator=generator).to(dtype)
    product = torch.empty(m, n, device=device, dtype=dtype)  # or else memory is measured, that is mapped anew each time
    torch.mm(a[: m // 16], b, out=product[: m // 16])  # what is done but once, such as choosing a kernel
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 16 and sum(seconds) < 0.2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * m * k * n / min(seconds)
