"""The process that trains: its device, threads, seeds and allocator.  The only place that reads the environment.

Importing this module does not import torch: :func:`prepare_process` has to come before that.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch


# malloc's cache of small blocks would keep the slivers that are cut off aligned blocks: a freed tensor's hole would be
# too small for the next tensor of that size, and the heap would grow by up to 0.4 GB over the first steps.
TUNABLE = "glibc.malloc.tcache_count"


def is_glibc() -> bool:
    """Whether malloc is glibc's."""
    return platform.libc_ver()[0] == "glibc"


def restart_with_tunables() -> None:
    """Start the program anew, in the same process, without malloc's cache: glibc reads that before Python is there.

    To be called when nothing has been imported or read yet; it takes 40 ms.  Does nothing where the environment has a
    size for the cache already, malloc is not glibc's, or there is no program to start.
    """
    present = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in present or not is_glibc() or not sys.executable or not sys.orig_argv:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [present, f"{TUNABLE}=0"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_program() -> None:
    """All that the command does before it imports torch to train, for a program that calls :class:`Run` itself."""
    restart_with_tunables()
    prepare_process()


def prepare_process() -> None:
    """Set up memory; to be called before torch is imported.

    On a CPU, freshly mapped memory costs a page fault every 4 KiB, a third of a training step and more.  So glibc's
    malloc neither maps big blocks one by one nor gives freed memory back: from the second step on, few new pages are
    touched, and after :func:`restart_with_tunables` next to none.  (torch's huge pages are left off: their alignment to
    2 MiB leaves gaps, 0.5 GB for GPT-2 in fp32, and with memory that is kept they save nothing.)  On a GPU, expandable
    segments keep the allocator from fragmenting.
    """
    # Python looks for garbage in cycles at every 700 new objects, and through all of them at exit: a third of the time
    # of a program that only imports torch and its compiler.  A training step leaves no tensor in a cycle.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)  # what is left at the end goes with the process
    # OpenMP's threads wait actively, by default for 15 ms: too long where another process wants the cores as well, two
    # small runs at once were 20 times slower each.  After 0.1 ms they would sleep and be woken at most of the 1,500
    # parallel loops of a step, which takes a fifth of its time.  So they wait for 1.5 ms.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))  # what is compiled, is once
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would write into the display
    if is_glibc():
        mallopt = ctypes.CDLL(None).mallopt  # parameters: malloc.h
        m_mxfast, m_trim_threshold, m_top_pad, m_mmap_max = 1, -1, -2, -4
        mallopt(m_mxfast, 0)  # slivers are merged with their neighbours at once
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never: 2**31 - 1 is 2 GB, which the top of a large heap exceeds in every step
        mallopt(m_top_pad, 64 << 20)


def cache_folder() -> Path:
    """Where data are cached, and what else is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LLMTRAIN_CACHE") or f"{cache}/llmtrain").expanduser()


class Device(Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Runtime:
    """The ``runtime`` group."""

    device: Device
    seed: int
    deterministic: bool
    compile: bool | str
    cuda_graphs: bool
    profile: bool
    num_threads: int | None

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads={self.num_threads}: must be at least 1, or null for one a physical core")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be between 0 and 2**63 - 1")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile={self.compile}: must be auto, true or false")
        if self.cuda_graphs and self.compile is not True:
            raise ValueError(f"cuda_graphs=true: takes compile=true, not compile={str(self.compile).lower()}")

    @classmethod
    def for_inference(cls, device: Device) -> Self:
        """That of a program that trains nothing."""
        return cls(device, 0, False, False, False, False, None)

    def torch_device(self) -> torch.device:
        """The device.  Raises ValueError if it is not there."""
        import torch

        if self.device is Device.cuda and not torch.cuda.is_available():
            raise ValueError("device=cuda: torch sees no CUDA device here; take runtime.device=cpu or auto")
        use_cuda = self.device is not Device.cpu and torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")

    @contextmanager
    def session(self) -> Iterator[torch.device]:
        """Threads and determinism for the duration of a run; yields the device."""
        import torch

        device = self.torch_device()
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        torch.set_num_threads(self.num_threads or physical_cores())
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its first handle
            torch.use_deterministic_algorithms(True)
        try:
            yield device
        finally:
            torch.set_num_threads(threads)
            if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it imports torch's compiler
                torch.use_deterministic_algorithms(deterministic)

    def seed_everything(self) -> None:
        """Seed every global generator (Python, NumPy, torch on all devices)."""
        import random

        import numpy as np
        import torch

        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)


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


def describe_environment(device: torch.device, command: list[str]) -> dict[str, Any]:
    """What ``environment.json`` records, so that a run can be understood and repeated elsewhere."""
    import importlib.metadata as metadata

    packages = ("llmtrain", "torch", "numpy", "safetensors", "tiktoken", "hydra-core", "omegaconf")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "git_commit": git_commit(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": device_name(device),
        "cpus": os.cpu_count(),
    }


def git_commit(directory: Path) -> str | None:
    """The commit that ``directory`` is a checkout of, with "+changes" if it was edited since; None outside of git."""
    import subprocess

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
