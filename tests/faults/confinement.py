"""Running code of the program in a process that can write nowhere but in one folder, and within a time limit.

Two fences stand around the process.  Landlock, where the kernel has it, holds for every system call of it and of all
that it starts: writing, removing and making files elsewhere, and the network, fail.  An audit hook of Python sees what
the interpreter is asked to do, refuses the same, and writes it down, so that an attempt is found and not only stopped.
"""

import ctypes
import os
import resource
import select
import signal
import stat
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmtrain.base.run_files import LOCK
from tests.helpers.processes import die_with_parent

MEMORY_FILES = 2 << 30  # bytes that one file may have
PR_SET_NO_NEW_PRIVS = 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls of Landlock, on x86-64 and arm64
PATH_BENEATH = 1
# Rights of Landlock: landlock.h
WRITE_FILE = 1 << 1
MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))
REFER, TRUNCATE = 1 << 13, 1 << 14
BIND_AND_CONNECT = 0b11
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of the audit hook: the positions of the paths in their arguments, each with that of its dir_fd.
EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),), "os.setxattr": ((0, None),), "os.removexattr": ((0, None),),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The end of a confined process."""

    status: int | None  # its exit status, negative for the signal that ended it; None: out of time, and killed
    output: str  # stdout and stderr
    outside: list[str]  # attempts to write outside of its folder
    seconds: float

    @property
    def crashed(self) -> bool:
        """True if it ended by a traceback, a signal or a bug that the program itself found."""
        return self.status is not None and (self.status < 0 or "Traceback (most recent call last)" in self.output)


def run_confined(folder: Path, call: Callable[[], int], *, seconds: float) -> Outcome:
    """Call ``call`` in a process of its own, in ``folder``; its result is the exit status.

    The process is a fork of this one, so whatever is imported here need not be imported there.  HOME, the temporary
    folder and all caches are below ``folder``.
    """
    output, report = os.memfd_create("output"), os.memfd_create("outside")
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(folder, call, output, report)
    status = _wait(pid, seconds)
    took = time.monotonic() - began
    texts = [os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace") for file in (output, report)]
    os.close(output)
    os.close(report)
    return Outcome(status, texts[0], texts[1].splitlines(), took)


def _wait(pid: int, seconds: float) -> int | None:
    """Wait for the process; kill it and all that it has started if it takes longer."""
    handle = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    in_time = poll.poll(1000 * seconds)
    try:
        os.killpg(pid, signal.SIGKILL)  # also what it has left behind
    except ProcessLookupError:
        if not in_time:  # not yet at the head of its group
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(handle)
    return os.waitstatus_to_exitcode(status) if in_time else None


def _child(folder: Path, call: Callable[[], int], output: int, report: int) -> NoReturn:
    status = 70
    try:
        os.setsid()
        die_with_parent()
        devnull = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, devnull), (1, output), (2, output)):
            os.dup2(source, target)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
        confine(folder, report)
        status = call()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status & 0xFF)


def places(folder: Path) -> dict[str, str]:
    """The variables of the environment that say where a process keeps its files, all below ``folder``."""
    names = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "home/.cache", "XDG_CONFIG_HOME": "home/.config"}
    names |= {"LLMTRAIN_CACHE": "cache", "TORCHINDUCTOR_CACHE_DIR": "cache/compiled", "HF_HOME": "home/huggingface"}
    return {variable: str(folder / name) for variable, name in names.items()}


def prepare(folder: Path) -> Path:
    """Make the folders that every process finds on a machine: its own, home and the temporary one."""
    for name in ("work", "home", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def confine(folder: Path, report: int) -> None:
    """Confine this process, for good: it writes below ``folder`` alone; attempts elsewhere are written to ``report``.

    It works in ``folder/work``.
    """
    folder = Path(os.path.realpath(folder))
    os.environ |= places(folder)
    import tempfile

    tempfile.tempdir = str(folder / "tmp")
    os.chdir(folder / "work")
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY_FILES, MEMORY_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    landlock(folder)
    inside = str(folder) + os.sep

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        for path in _written(event, arguments):
            place = _real(path)
            if place + os.sep != inside and not place.startswith(inside) and place != os.devnull:
                os.write(report, f"{event} {place}\n".encode(errors="backslashreplace"))
                raise PermissionError(13, "outside of the folder of this process", place)

    sys.addaudithook(audit)


def _written(event: str, arguments: tuple[Any, ...]) -> Iterator[str]:
    """The paths that an event of Python would write to, make or remove."""
    if event == "open":
        path, _, flags = arguments
        if flags & WRITING and not isinstance(path, int) and path is not None:
            yield os.fsdecode(path)
        return
    for path, parent in EVENTS.get(event, ()):
        place = arguments[path]
        if isinstance(place, int):  # an open file
            continue
        at = arguments[parent] if parent is not None and parent < len(arguments) else -1
        folder = f"/proc/self/fd/{at}" if isinstance(at, int) and at >= 0 else ""
        yield os.path.join(folder, os.fsdecode(place))  # noqa: PTH118


def _real(path: str) -> str:
    """The path without links in its folders; the last part may be one that is to be made or removed."""
    head, tail = os.path.split(os.path.abspath(path))  # noqa: PTH100
    return os.path.join(os.path.realpath(head), tail)  # noqa: PTH118


def landlock(folder: Path) -> bool:
    """Let the kernel refuse writes outside of ``folder``, and the network; returns whether it can."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = WRITE_FILE | MAKE_AND_REMOVE | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("QQ", rights, BIND_AND_CONNECT) if version >= 4 else struct.pack("Q", rights)
    ruleset = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    for place, allowed in ((folder, rights), (Path(os.devnull), rights & (WRITE_FILE | TRUNCATE))):
        descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, descriptor)
        assert libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0) == 0, os.strerror(ctypes.get_errno())
        os.close(descriptor)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    restricted = libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


Snapshot = dict[str, tuple[int, int, int]]


def snapshot(folder: Path) -> Snapshot:
    """Kind, size and time of change of everything below ``folder``; nothing is followed."""
    found: Snapshot = {}
    stack = [folder]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                is_folder = stat.S_ISDIR(about.st_mode)
                # The time of a folder changes with the files in it, which are here themselves; that of a lock by use.
                changed = 0 if is_folder or entry.name == LOCK else about.st_mtime_ns
                found[entry.path] = (about.st_mode, 0 if is_folder else about.st_size, changed)
                if is_folder:
                    stack.append(Path(entry.path))
    return found


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """The paths that were made, removed or changed between two snapshots."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
