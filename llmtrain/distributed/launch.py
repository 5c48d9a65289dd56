"""The supervisor: starts the ranks of a run on this machine, passes signals on, and ends them together.

Not torch's elastic agent: that kills 30 seconds after a SIGTERM, in the middle of a save, and loses the exit status 75.
Importing this module does not import torch.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.base.format import counted, visible
from llmtrain.base.invocation import FAILED, FINISHED, INTERRUPTED, USAGE_ERROR
from llmtrain.base.run_files import CONFIG
from llmtrain.distributed.cause import RankEnd, describe, find_cause, is_failure, only_consequences, ranks_to_blame
from llmtrain.distributed.hostfile import Host
from llmtrain.distributed.rank_process import LocalRank, RankProcess, share_threads
from llmtrain.distributed.remote_rank import SSH, RemoteRank
from llmtrain.distributed.roster import Fewer, Roster, is_here
from llmtrain.distributed.supervision import FOLDER

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Patience:
    """The waits of a supervisor, in seconds."""

    poll: float = 0.05  # between two looks at the ranks
    settle: float = 1.0  # after the first failure: the rank that caused it may be seen later than its consequences
    settle_consequences: float = 3.0  # … as long as there are only consequences
    grace: float = 4.0  # between SIGTERM and SIGKILL
    saving: float = 300.0  # for ranks that are writing a checkpoint, instead of grace


@dataclass
class Signals:
    """The signals that the supervisor has received, and those of them that its ranks have got."""

    received: list[int] = field(default_factory=list)
    forwarded: int = 0

    def forward(self, ranks: Sequence[RankProcess]) -> None:
        """Send each signal that is new to each rank, once."""
        for number in self.received[self.forwarded :]:
            for rank in ranks:
                rank.send_signal(number)
            self.forwarded += 1


@dataclass(frozen=True)
class Outcome:
    """The end of all ranks."""

    status: int
    cause: RankEnd | None = None  # of a failure
    hosts: frozenset[str] = frozenset()  # that the failure came from, by their names in the hostfile

    @property
    def smaller_micro_batch(self) -> int:
        """After memory ran out on a rank the size with which a restart may fit; else 0."""
        return self.cause.failure.smaller_micro_batch if self.cause and self.cause.failure else 0


def supervise(
    command: Sequence[str],
    processes: int,
    *,
    restarts: int = 0,
    resume_command: Callable[[Path], Sequence[str]] | None = None,
    with_micro_batch: Callable[[int], Sequence[str]] | None = None,
    environment: Mapping[str, str] | None = None,
    has_own_threads: bool = False,
    hosts: Sequence[Host] = (),
    ssh: str = SSH,
    patience: Patience | None = None,
    fewer: Fewer | None = None,
) -> int:
    """Run ``command`` as the ranks of one job, ``processes`` of them; returns the exit status.

    They run on this machine, or on ``hosts``, as many on each as it has slots; ``ssh`` is the command that runs a
    script on ``{host}``.  The directory of this process and the program must be there under the same names.

    ``resume_command`` makes the command that continues the run in a directory, or starts it there if it has no
    checkpoint; ``restarts`` times it follows the failure of a rank, on the machines that are there then, where
    ``fewer`` allows it.  Where memory ran out on a rank, a restart that does not count adds the arguments of
    ``with_micro_batch``, for micro-batches of so many sequences.

    ``environment`` replaces that of this process.  ``has_own_threads``: the run names its number of threads, so that
    OMP_NUM_THREADS is left alone.

    The status is 0 if that of all ranks is 0; 75 if all that were not ended by a signal gave 75; 2 for a mistake of the
    user's; 128 + N if signal N stopped the ranks before they could save; else 1.
    """
    base = dict(os.environ if environment is None else environment)
    assert not hosts or sum(host.slots for host in hosts) == processes
    hosts = hosts or [Host("", processes)]
    supervisor, first = Supervisor(hosts, base, patience or Patience(), not has_own_threads, ssh), command
    with forwarded_signals() as signals:
        roster = Roster(hosts, fewer or Fewer(), ssh, say, lambda: bool(signals.received))
        attempt, extra = 0, list[str]()
        while True:
            outcome = supervisor.run(command, signals)
            if outcome.status != FAILED or outcome.cause is None or signals.received:
                return outcome.status
            if with_micro_batch is not None and (size := outcome.smaller_micro_batch):
                extra = list(with_micro_batch(size))
                label = f"llmtrain: micro-batches of {counted(size, 'sequence')} from now on"
            elif attempt == restarts:
                return outcome.status
            else:
                attempt += 1
                label = f"llmtrain: restart {attempt} of {restarts}"
                roster.record_failure(outcome.hosts)
                present = roster.next_hosts()
                if present is None:
                    return 128 + signals.received[0] if signals.received else FAILED
                supervisor.hosts = present
            command = [*supervisor.next_command(first, resume_command, label), *extra]


class Supervisor:
    """Starts the ranks of a job, watches them and ends them together."""

    def __init__(self, hosts: Sequence[Host], environment: dict[str, str], patience: Patience, shares_threads: bool,
                 ssh: str) -> None:  # fmt: skip
        self.hosts = hosts
        self.environment = environment
        self.patience = patience
        self.shares_threads = shares_threads
        self.ssh = ssh
        self.run_directory: Path | None = None  # as rank 0 has told it, in any of the starts

    @property
    def processes(self) -> int:
        """The number of ranks of the next start."""
        return sum(host.slots for host in self.hosts)

    def run(self, command: Sequence[str], signals: Signals) -> Outcome:
        """Run ``command`` as all ranks to their end."""
        folder = Path(tempfile.mkdtemp(prefix="llmtrain-ranks-"))
        ranks: list[RankProcess] = []
        try:
            for host, environment in self.places(folder):
                ranks.append(self.start(len(ranks), host, command, environment, folder))
            return self.watch(ranks, signals)
        finally:
            for rank in ranks:
                rank.close()
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, rank: int, host: Host, command: Sequence[str], environment: dict[str, str],
              folder: Path) -> RankProcess:  # fmt: skip
        """Start a rank here or on another machine; the output of rank 0 is shown."""
        if is_here(host):
            return LocalRank(rank, command, environment, folder, output=None if rank else 1)
        return RemoteRank(rank, host.name, command, environment, folder, ssh=self.ssh, shows_output=rank == 0,
                          shares_threads=self.shares_threads)  # fmt: skip

    def places(self, folder: Path) -> Iterator[tuple[Host, dict[str, str]]]:
        """Yield the host and the environment of each rank: torchrun's names, which all programs know."""
        is_local = is_here(self.hosts[0])
        shared = self.environment | {
            "WORLD_SIZE": str(self.processes), FOLDER: str(folder),
            "MASTER_ADDR": self.hosts[0].address if len(self.hosts) > 1 else LOOPBACK,
            "MASTER_PORT": str(free_port() if is_local else 10_000 + secrets.randbelow(20_000)),
        }  # fmt: skip
        shared.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that is gone would be a page of stack frames
        if is_local and len(self.hosts) == 1 and sys.platform == "linux":
            shared.setdefault("GLOO_SOCKET_IFNAME", "lo")  # works also where the machine's own name has no address
        rank = 0
        for host in self.hosts:
            for local_rank in range(host.slots):
                place = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(host.slots)}
                environment = shared | place
                if self.shares_threads and is_here(host):
                    share_threads(environment, host.slots)
                yield host, environment
                rank += 1

    def watch(self, ranks: Sequence[RankProcess], signals: Signals) -> Outcome:
        """Wait for the end of all ranks; after a failure of one, end the others."""
        ended: dict[int, RankEnd] = {}
        while len(ended) < len(ranks):
            signals.forward(ranks)
            collect(ranks, ended)
            if any(is_failure(end.status) for end in ended.values()):
                self.settle(ranks, ended, signals)
                self.end(ranks, ended, signals)
                break
            time.sleep(self.patience.poll)
        return self.judge(ranks, list(ended.values()), signals)

    def settle(self, ranks: Sequence[RankProcess], ended: dict[int, RankEnd], signals: Signals) -> None:
        """Wait a moment after the first failure for that of the rank that caused it."""
        began = time.monotonic()
        while len(ended) < len(ranks):
            signals.forward(ranks)
            collect(ranks, ended)
            waits_for_more = only_consequences(list(ended.values()), is_whole=len(ended) == len(ranks))
            limit = self.patience.settle_consequences if waits_for_more else self.patience.settle
            if time.monotonic() - began > limit:
                return
            time.sleep(self.patience.poll)

    def end(self, ranks: Sequence[RankProcess], ended: dict[int, RankEnd], signals: Signals) -> None:
        """End the ranks that are left: SIGTERM, after a while SIGKILL, but never in the middle of a save."""
        for rank in ranks:
            if rank.rank not in ended:
                rank.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while len(ended) < len(ranks):
            signals.forward(ranks)
            collect(ranks, ended, by_supervisor=True)
            waited = time.monotonic() - began
            for rank in ranks:
                limit = self.patience.saving if rank.is_saving() else self.patience.grace
                if rank.rank not in ended and waited > limit:
                    rank.send_signal(signal.SIGKILL)
            time.sleep(self.patience.poll)

    def judge(self, ranks: Sequence[RankProcess], ends: list[RankEnd], signals: Signals) -> Outcome:
        """Find the status of the job; report the cause of a failure."""
        directories = [each for rank in ranks if (each := rank.run_directory()) is not None]
        directory = self.run_directory = directories[0] if directories else self.run_directory
        statuses = [end.status for end in ends]
        if not any(statuses):
            return Outcome(FINISHED)
        normal = [status for status in statuses if status >= 0]
        is_stop = bool(signals.received) or not any(end.is_by_supervisor and end.status == INTERRUPTED for end in ends)
        if normal and set(normal) == {INTERRUPTED} and is_stop:
            return Outcome(INTERRUPTED)
        cause = find_cause(ends)
        if cause is None:
            say(f"llmtrain: the ranks ended with different exit statuses: {', '.join(map(str, statuses))}")
            return Outcome(FAILED)
        if cause.signal in signals.received:
            return Outcome(128 + signals.received[0])
        for line in describe(cause, ends, directory):
            say(line)
        blamed = ranks_to_blame(cause, ends)
        names = [host.name for host in self.hosts for _ in range(host.slots)]
        hosts = frozenset(names[rank] for rank in blamed)
        return Outcome(USAGE_ERROR if cause.status == USAGE_ERROR else FAILED, cause, hosts)

    def next_command(
        self, command: Sequence[str], resume_command: Callable[[Path], Sequence[str]] | None, label: str
    ) -> Sequence[str]:
        """Choose the command after a failure, and say so: resume the run, or start it again if it has not begun."""
        directory = self.run_directory
        number = "1 process" if self.processes == 1 else f"{self.processes} processes"
        end = "s" if self.processes == 1 else ""
        left = usable_directory(directory) if directory is not None else None
        if left is not None and resume_command is not None:
            say(f"{label}: {number} resume{end} {left}")
            return resume_command(left)
        self.run_directory = None if left is None else directory
        say(f"{label}: {number} start{end} anew")
        return command


def usable_directory(directory: Path) -> Path | None:
    """``directory`` if a run in it can be resumed; None: the command has to start again.

    One that was made but has no config yet, as after a kill at the start, is moved aside: the command would refuse it.
    """
    if (directory / CONFIG).is_file():
        return directory
    if directory.is_dir() and not (directory / CONFIG).exists():
        aside = free_name(directory)
        with contextlib.suppress(OSError):
            directory.rename(aside)
            say(f"llmtrain: {directory}: a start that failed has left no config in it; moved to {aside}")
    return None


def collect(ranks: Sequence[RankProcess], ended: dict[int, RankEnd], *, by_supervisor: bool = False) -> None:
    """Add the ranks that have ended since the last call."""
    for rank in ranks:
        if rank.rank not in ended and (status := rank.poll()) is not None:
            ended[rank.rank] = RankEnd(rank.rank, rank.host, status, len(ended), rank.failure(), rank.log(),
                                       tuple(rank.last_lines(8)), by_supervisor)  # fmt: skip


@contextlib.contextmanager
def forwarded_signals() -> Iterator[Signals]:
    """Record the signals that a supervisor passes on, instead of being ended by them; one that is ignored stays so."""
    signals = Signals()

    def record(number: int, _: Any) -> None:
        signals.received.append(number)

    caught = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, record) for number in caught}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def free_name(directory: Path) -> Path:
    """A name beside ``directory`` for what a failed start left."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}.failed-{number}")).exists():
        number += 1
    return aside


def say(text: str) -> None:
    """Print a line to stderr."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(visible(text), file=sys.stderr, flush=True)
