"""Errors of the machine: one message that names the limit, and no traceback."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.cli.machine_errors import explain_machine


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: none is free"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory: [enforce"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory: libtorch_cpu.so"),
        (RuntimeError("can't start new thread"), "no thread or process can be started"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no thread or process can be started"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "a: Too many open files (the limit is"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "a: No space left on device; make room"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a: Read-only file system; name another place"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_errors_of_the_machine_have_a_message(error: BaseException, message: str) -> None:
    assert str(explain_machine(error)).startswith(message)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ImportError("No module named x"), ValueError("lr=1: no")])
def test_other_errors_are_left_to_others(error: BaseException) -> None:
    assert explain_machine(error) is None


def test_a_limit_of_the_process_is_named(tmp_path: Path) -> None:
    command = 'ulimit -v 300000; exec "$0" -m llmtrain train model=tiny tokenizer=byte'
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, cwd=tmp_path,
                          env=environment)  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search("out of memory: .*the limit is 307 MB: ulimit -v", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())
