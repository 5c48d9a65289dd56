"""The process: its allocator, garbage collector and threads.  Importing this module does not import torch."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import re
import sys
from enum import Enum
from pathlib import Path

# malloc's cache of small blocks would keep the slivers that are cut off aligned blocks: the hole of a freed tensor
# would be too small for the next tensor of its size, and the heap would grow by up to 0.4 GB over the first steps.
TUNABLE = "glibc.malloc.tcache_count"
MARK = "LLMTRAIN_SET_TUNABLE"  # in the environment: a restart of this program has set TUNABLE, not the user


ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # torch's, for GPUs


class Allocator(Enum):
    """The behaviour of malloc on the host."""

    auto = "auto"  # tuned where the process computes on a CPU
    tuned = "tuned"
    system = "system"

    @classmethod
    def named(cls, name: str | None) -> Allocator:
        """Find a value by its name; auto for None and for a name that the check of the config will refuse."""
        return cls.__members__.get(name or "", cls.auto)

    def resolve(self, device: str) -> Allocator:
        """Replace auto by the choice for ``device``, as in ``runtime.device``."""
        if self is not Allocator.auto:
            return self
        return Allocator.system if takes_gpu(device) else Allocator.tuned


def takes_gpu(device: str, root: Path = Path("/")) -> bool:
    """Return whether a process computes on a GPU if ``device``, as in ``runtime.device``, asks for it.

    torch is not imported: its build is read from its file ``version.py``.
    """
    if device == "cpu" or not (nvidia_gpus(root) or (root / "dev/kfd").exists()):
        return False
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if version is None or not version.is_file():
        return False
    built_for = "cuda" if nvidia_gpus(root) else "hip"
    return re.search(rf"(?m)^{built_for}\b.*= *['\"]", version.read_text(encoding="utf-8")) is not None


def nvidia_gpus(root: Path = Path("/")) -> list[str]:
    """List the NVIDIA GPUs of this machine, by the names of their devices, unless the environment hides all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\d|GPU-|MIG-", visible.strip()):  # "", "-1": none
        return []
    return sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))


def is_glibc() -> bool:
    import platform

    return platform.libc_ver()[0] == "glibc"


def restart_with_tunables() -> None:
    """Restart the program, in the same process, without malloc's cache: glibc reads the setting before Python starts.

    Call it before anything else is imported or read; it takes 40 ms.  It does nothing where the environment already
    sets the size of the cache, where malloc is not glibc's, or where there is no program to start.
    """
    present = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in present or not is_glibc():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [present, f"{TUNABLE}=0"]))
    os.environ[MARK] = "1"
    _restart()


def restart_without_tunables() -> None:
    """Restart the program without the settings of :func:`restart_with_tunables`, as in the parent process of a job.

    A setting of the user's stays.
    """
    if not has_own_tunables():
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    os.environ["GLIBC_TUNABLES"] = ":".join(each for each in tunables if not each.startswith(f"{TUNABLE}="))
    del os.environ[MARK]
    _restart()


def has_own_tunables() -> bool:
    """Return whether this program, and not the user, has set glibc's tunables."""
    return MARK in os.environ


def _restart() -> None:
    if sys.executable and sys.orig_argv:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_program() -> None:
    """Set up a Python program that trains with :class:`Run`, as the command does; call it before importing torch."""
    if Allocator.auto.resolve("auto") is Allocator.tuned:
        restart_with_tunables()
    prepare_process()


def prepare_process(allocator: Allocator = Allocator.auto) -> None:
    """Set up memory, garbage collection and threads; call it before importing torch.

    On a CPU, freshly mapped memory costs a page fault every 4 KiB, a third of a training step and more.  So a tuned
    malloc neither maps big blocks one by one nor gives freed memory back: from the second step on, few new pages are
    touched, and after :func:`restart_with_tunables` next to none.  torch's huge pages stay off: their alignment to
    2 MiB leaves gaps, 0.5 GB for GPT-2 in fp32, and save nothing where memory is kept.  On a GPU the host's tensors are
    small, and a tuned malloc would only take a tenth of its time.  There expandable segments keep torch's own allocator
    from fragmenting, unless the user has set it, by any of its names.
    """
    # Python searches for cycles after every 700 new objects, and through all objects at exit: a third of the time of a
    # program that only imports torch and its compiler.  A training step leaves no tensor in a cycle.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)  # nothing is searched at exit
    # OpenMP's threads wait actively, by default for 15 ms.  That is too long where another process needs the cores:
    # two small runs at once were 20 times slower each.  After only 0.1 ms they would sleep and be woken at most of the
    # 1,500 parallel loops of a step, a fifth of its time.  1.5 ms avoids both.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would write into the display
    if allocator.resolve("auto") is Allocator.tuned and is_glibc():
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt  # parameters: malloc.h
        m_mxfast, m_trim_threshold, m_top_pad, m_mmap_max = 1, -1, -2, -4
        mallopt(m_mxfast, 0)  # slivers are merged with their neighbours at once
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never: the largest int, 2 GB, is less than the top of a large heap
        mallopt(m_top_pad, 64 << 20)


def cache_folder() -> Path:
    """Return the folder of cached data and of everything else that is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LLMTRAIN_CACHE") or f"{cache}/llmtrain").expanduser()
