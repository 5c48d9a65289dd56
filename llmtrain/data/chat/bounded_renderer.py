"""Foreign chat templates rendered in a process of their own, under limits of memory and time.

A sandbox keeps a template away from files and from the program's objects; it bounds neither memory nor time.  The
process is started once, on first use, and serves all templates; a rendering that exceeds a limit costs the process,
and the next one starts another.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.base.checks import needing_package
from llmtrain.base.format import size

CPU_SECONDS = 3.0  # of a request; an ordinary conversation takes some milliseconds
WALL_SECONDS = 120.0  # backstop for a process that neither works nor ends
MEMORY_BYTES = 512 << 20  # address space of the process


class RenderJob(NamedTuple):
    """A rendering to be made."""

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]


class FailureKind(Enum):
    """The reason why a rendering was not completed."""

    refusal = "the template itself has refused the messages, by raise_exception"
    error = "the template has a mistake, or does not fit the messages"
    limit = "it took too much time or memory, or the process ended"


class RenderFailure(NamedTuple):
    """A rendering that a template did not complete."""

    message: str
    kind: FailureKind


class BoundedRenderer:
    """Rendering of templates within ``cpu_seconds`` of processor time a request and ``memory_bytes``."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self.cpu_seconds, self.memory_bytes = cpu_seconds, memory_bytes
        self._folders = _jinja_folders()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # one request at a time: rendering is Python, one core's work

    def compile(self, source: str, now: datetime) -> None:
        """Raise ValueError if ``source`` is no template."""
        self(source, now, [])

    def __call__(self, source: str, now: datetime, jobs: Sequence[RenderJob]) -> list[str | RenderFailure]:
        """Render ``jobs``; a failure is a result.  Raises ValueError if ``source`` is no template."""
        renders = [job._asdict() for job in jobs]
        request = (
            json.dumps({"source": source, "date": now.isoformat(), "renders": renders}, default=str).encode() + b"\n"
        )
        with self._lock:
            answer = self._ask(request)
        if isinstance(answer, str):
            if not jobs:
                raise ValueError(f"template=tokenizer: the tokenizer's chat template cannot be used: it {answer}")
            return [RenderFailure(answer, FailureKind.limit)] * len(jobs)
        if isinstance(answer, dict):
            raise ValueError(f"template=tokenizer: the tokenizer's chat template is damaged: {answer['damaged']}")
        return [each["text"] if "text" in each else self._failure(each) for each in answer]

    def _failure(self, answer: Mapping[str, str]) -> RenderFailure:
        kind, message = answer["error"], answer["message"]
        if kind == "TemplateError":
            return RenderFailure(message, FailureKind.refusal)
        if kind == "MemoryError":
            return RenderFailure(f"needs more than {size(self.memory_bytes)} of memory", FailureKind.limit)
        if kind == "TextTooLong":
            return RenderFailure(f"makes a text of {message}", FailureKind.limit)
        return RenderFailure(f"raises {kind}{': ' if message else ''}{message}", FailureKind.error)

    def _ask(self, request: bytes) -> Any:
        """Send a request; return the answer, or the reason why there is none."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = _read_line(process, time.monotonic() + WALL_SECONDS)
        except BrokenPipeError:
            line = b""
        except BaseException:  # an interrupt: its answer would be taken for that of the next request
            self._end(process)
            raise
        if line.endswith(b"\n"):
            return json.loads(line)
        self._end(process)
        if process.returncode == -signal.SIGXCPU:
            return f"takes more than {self.cpu_seconds:g} s of processor time"
        if process.returncode == -signal.SIGKILL:
            return f"takes more than {WALL_SECONDS:g} s, or the system's memory"
        return f"ends its process ({process.returncode})"

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that has ended by itself tells how
            process.wait(0.2)
        _kill(process)
        self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        script = str(Path(__file__).with_name("template_process.py"))
        limits = [str(self.cpu_seconds), str(self.memory_bytes)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", script, *limits, *self._folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this program; the process ends when its input does
        )
        weakref.finalize(self, _kill, process)
        return process


@cache
def shared_renderer() -> BoundedRenderer:
    """The renderer of this process.  Raises ValueError without a jinja2 whose sandbox is secure."""
    return BoundedRenderer()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # a request that was never read
                pipe.close()


def _read_line(process: "subprocess.Popen[bytes]", deadline: float) -> bytes:
    """Read up to a line's end, the end of the output, or ``deadline``."""
    assert process.stdout is not None
    handle, pieces = process.stdout.fileno(), []
    while True:
        ready, _, _ = select.select([handle], [], [], max(deadline - time.monotonic(), 0))
        piece = os.read(handle, 1 << 20) if ready else b""
        pieces.append(piece)
        if not piece or piece.endswith(b"\n"):
            return b"".join(pieces)


def _jinja_folders() -> list[str]:
    with needing_package('template=tokenizer: needs jinja2; pip install "llmtrain[huggingface]"'):
        import jinja2
        import markupsafe
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ValueError(
            f"template=tokenizer: the sandbox of jinja2 {jinja2.__version__} is not secure; pip install -U jinja2"
        )
    return list(dict.fromkeys(str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)))
