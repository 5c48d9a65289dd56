"""The process: its allocator, garbage collector and threads.  Importing this does not import torch."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


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
