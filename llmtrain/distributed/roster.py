"""The machines of a job from one start to the next: those that have come back, and those that are left out.

Importing this module does not import torch.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmtrain.distributed.hostfile import Host, is_loopback
from llmtrain.distributed.remote_rank import SSH, connection_command

MOST_FAILURES = 2  # of a machine, before it is left out
ATTEMPT_SECONDS = 20.0  # for one connection to a machine
COUNT_GPUS = "nvidia-smi -L 2>/dev/null | grep -c '^GPU [0-9]*: '"  # one that has failed is in no such line


@dataclass(frozen=True)
class Fewer:
    """The terms on which a job goes on with fewer ranks."""

    least: int | None = None  # ranks; None: all are needed
    misfit: Callable[[int], str | None] = lambda _: None  # why a mesh cannot have so many ranks; None: it can
    on_gpus: bool = False  # a rank needs a GPU of its own
    absence_seconds: float = 120.0  # for a machine to answer, where the others suffice
    needed_seconds: float = 600.0  # … where they do not


@dataclass(frozen=True)
class Answer:
    """A machine's answer to a connection before a restart."""

    error: str | None = None  # None: it is there, with the directory and the program
    gpus: int = 0  # 0: none, or not known


@dataclass
class Roster:
    """The machines of a job, and their failures."""

    hosts: Sequence[Host]
    fewer: Fewer = field(default_factory=Fewer)
    ssh: str = SSH
    say: Callable[[str], None] = print
    is_stopped: Callable[[], bool] = lambda: False
    failures: Counter[str] = field(default_factory=Counter)

    def record_failure(self, names: Iterable[str]) -> None:
        """Count a failure for the machine that it came from; none where it came from several at once."""
        blamed = set(names)
        if len(blamed) == 1 and len(self.hosts) > 1:
            self.failures.update(blamed)

    def next_hosts(self) -> list[Host] | None:
        """Find the machines of the next start, and say who is left out; None: they do not suffice, or a stop came.

        Waits for machines that do not answer.
        """
        wanted = self._without_failing()
        answers = self._wait_for(wanted)
        if self.is_stopped():
            return None
        present: list[Host] = []
        for host in wanted:
            answer = answers[host.name]
            if answer.error is not None:
                self.say(f"llmtrain: host {host.name} does not answer, and is left out of this start: {answer.error}")
            elif self.fewer.on_gpus and 0 < answer.gpus < host.slots and self.fewer.least is not None:
                self.say(f"llmtrain: {_named(host)} has {answer.gpus} GPUs left of {host.slots}")
                present.append(replace(host, slots=answer.gpus))
            else:
                present.append(host)
        hosts, reason = self._fitting(present)
        if hosts is None:
            self.say(f"llmtrain: no restart: {reason}")
        return hosts

    def _without_failing(self) -> list[Host]:
        """The machines without those that have failed twice, as long as the others suffice."""
        failing = [host for host in self.hosts if self.failures[host.name] >= MOST_FAILURES]
        if not failing:
            return list(self.hosts)
        others = [host for host in self.hosts if host not in failing]
        names = _names(failing)
        noun, verb = ("host", "has") if len(failing) == 1 else ("hosts", "have")
        hosts, reason = self._fitting(others)
        if hosts is None:
            self.say(f"llmtrain: {noun} {names} {verb} failed {MOST_FAILURES} times, and cannot be left out: {reason}")
            return list(self.hosts)
        self.say(f"llmtrain: {noun} {names} {verb} failed {MOST_FAILURES} times: left out from now on")
        self.hosts = others
        return others

    def _fitting(self, hosts: Sequence[Host]) -> tuple[list[Host] | None, str]:
        """The largest part of ``hosts`` that makes a mesh, by the order of the hostfile; None with the reason."""
        slots = sum(host.slots for host in hosts)
        whole = sum(host.slots for host in self.hosts)
        least = whole if self.fewer.least is None else self.fewer.least
        if slots < least:
            there = f"{slots} of {whole} processes can be started"
            if self.fewer.least is None:
                return None, f"{there}; distributed.min_processes=N goes on with N or more"
            return None, f"{there}, fewer than distributed.min_processes={least}"
        first_reason = ""
        for processes in range(slots, least - 1, -1):
            reason = self.fewer.misfit(processes)
            if reason is None:
                return trimmed(hosts, processes), ""
            first_reason = first_reason or reason
        return None, f"{slots} processes are left, and {first_reason}"

    def _wait_for(self, hosts: Sequence[Host]) -> dict[str, Answer]:
        """Ask machines until all answer, or time is up: less of it where those that answer suffice."""
        began = time.monotonic()
        answers: dict[str, Answer] = {}
        is_said = False
        with ThreadPoolExecutor(max_workers=32) as pool:
            while True:
                missing = [host for host in hosts if host.name not in answers or answers[host.name].error is not None]
                answers |= zip((host.name for host in missing), pool.map(self._ask, missing), strict=True)
                missing = [host for host in hosts if answers[host.name].error is not None]
                present = [host for host in hosts if host not in missing]
                suffices = self.fewer.least is not None and self._fitting(present)[0] is not None
                limit = self.fewer.absence_seconds if suffices else self.fewer.needed_seconds
                if not missing or time.monotonic() - began > limit or self.is_stopped():
                    return answers
                if not is_said:
                    is_said = True
                    self.say(f"llmtrain: waiting for {_names(missing)}, {limit:g} s at most: "
                             f"{answers[missing[0].name].error}")  # fmt: skip
                self._pause(min(2.0, limit / 4))

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_stopped():
            time.sleep(0.05)

    def _ask(self, host: Host) -> Answer:
        """Ask a machine for its GPUs."""
        script = f"cd {shlex.quote(str(Path.cwd()))} && test -x {shlex.quote(sys.executable)} && echo here"
        script += f"; {COUNT_GPUS}" if self.fewer.on_gpus else ""
        command = ["sh", "-c", script] if is_here(host) else [*connection_command(self.ssh, host.name), script]
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True, errors="replace",
                                       start_new_session=True)  # fmt: skip
        except OSError as error:
            return Answer(str(error))
        output, errors = _communicate(process, min(ATTEMPT_SECONDS, self.fewer.needed_seconds), self.is_stopped)
        lines = output.split()
        if "here" not in lines:
            last = [line for line in errors.splitlines() if line.strip()][-1:]
            status = process.returncode
            return Answer("".join(last).strip() or ("no answer" if status < 0 else f"exit status {status}"))
        return Answer(gpus=int(lines[-1]) if lines[-1].isdecimal() else 0)


def _communicate(process: "subprocess.Popen[str]", seconds: float, is_stopped: Callable[[], bool]) -> tuple[str, str]:
    """Wait for the output and the errors of ``process``; end it after so many seconds, or at a stop."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return process.communicate(timeout=0.2)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline or is_stopped():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                return process.communicate()


def trimmed(hosts: Sequence[Host], processes: int) -> list[Host]:
    """``hosts`` with slots for so many processes: those at the end are left out, or have fewer."""
    kept: list[Host] = []
    for host in hosts:
        slots = min(host.slots, processes - sum(each.slots for each in kept))
        if slots:
            kept.append(replace(host, slots=slots))
    return kept


def is_here(host: Host) -> bool:
    """Return whether a host is this machine, by its name."""
    return not host.name or is_loopback(host.name) or host.name == socket.gethostname()


def _named(host: Host) -> str:
    return f"host {host.name}" if host.name else "this machine"


def _names(hosts: Sequence[Host]) -> str:
    return " and ".join(host.name for host in hosts) if len(hosts) < 3 else ", ".join(host.name for host in hosts)
