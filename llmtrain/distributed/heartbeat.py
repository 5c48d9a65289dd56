"""Heartbeats of the ranks through a store: a rank that hangs is named, and the job ends instead of waiting for ever.

Each rank has a connection of its own to the store of the process group's rendezvous, and one key, which its thread
sets about once a second.  Rank 0 reads the keys of all, in one request for every 256; the others read that of rank 0
and the verdict.  So a store serves two small requests a rank and beat, and the beat is slower from 500 ranks on.

The main thread only assigns: signal handlers of Python wait while it is in a collective, a thread does not.
"""

import contextlib
import datetime
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from llmtrain.base.files import AppendedFile, open_own
from llmtrain.base.format import visible
from llmtrain.base.invocation import FAILED
from llmtrain.base.run_files import LOG
from llmtrain.base.streams import write_to_stderr
from llmtrain.distributed.phases import Key, Phase, Position, Verdict, find_silence, judge, last_key
from llmtrain.distributed.supervision import Kind, Supervision

CHUNK = 256  # keys in one request
VERDICT = "verdict"
NONE = "-"  # the verdict while there is none
SLOW_FROM = 500  # ranks: from here on the beat is slower
LOST_SECONDS = 3.0  # for the main thread to end by itself, with a better message, when the store is gone
CONNECT_SECONDS = 60.0


def beat_seconds(size: int, timeout_seconds: float) -> float:
    """The time between two heartbeats of a rank, of ``size``."""
    return min(1.0, timeout_seconds / 8) * max(1.0, size / SLOW_FROM)


class Heartbeat:
    """The heartbeat of this rank, and its watch over the others.

    ``address`` and ``port`` are those of the rendezvous (MASTER_ADDR, MASTER_PORT); start it when the process group is
    initialised.  ``generation`` separates the keys of one start from those of another with the same store, as torchrun
    has it.  ``run_dir`` may be set later, when the directory is made.  ``show`` prints a message; None: to stderr.
    """

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        size: int,
        *,
        timeout_seconds: float = 600.0,
        run_dir: Path | None = None,
        supervision: Supervision | None = None,
        show: Callable[[str], Any] | None = None,
        generation: str = "0",
    ) -> None:
        self.address, self.port, self.rank, self.size = address, port, rank, size
        self.timeout_seconds = timeout_seconds
        self.interval = beat_seconds(size, timeout_seconds)
        self.run_dir = run_dir
        self.supervision = supervision
        self.show = show or (lambda text: write_to_stderr(f"llmtrain: {text}"))
        self.generation = generation
        self.host = visible(socket.gethostname()).replace("|", "")
        self.place: tuple[Phase, int] = (Phase.start, 0)
        self.writes_since: float | None = None  # its files of a checkpoint, in a thread; of time.monotonic
        self.collectives: Callable[[], int] = lambda: 0  # that it has begun with all ranks
        self._closed = threading.Event()
        self._is_leaving = False
        self._first_host = address  # the machine of rank 0, by its own name once it is known
        self._failure: str | None = None
        self._published = threading.Event()  # the failure
        self._rounds = 0  # of the beat, each with an answer from the store
        self._warned: set[Any] = set()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []

    def mark(self, phase: Phase, step: int) -> None:
        """Record where the main thread is: one assignment.  Each call counts as progress."""
        self.place = (phase, step)

    def start(self) -> "Heartbeat":
        """Start the threads."""
        for target in (self._beat, self._watch_store):
            thread = threading.Thread(target=target, name=f"heartbeat-{target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def prepare_to_leave(self) -> None:
        """From now on a store that is gone is no failure: another rank may have ended first."""
        self._is_leaving = True

    def close(self) -> None:
        """End the threads; the other ranks do not miss this one any more."""
        self._is_leaving = True
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.interval + 1)

    def fail(self, message: str) -> None:
        """Tell the other ranks that this one ends with an error, so that they end, too; waits a moment for it."""
        self._failure = " ".join(message.split())[:2000]
        if self._threads:
            self._published.wait(timeout=self.interval + 1)
            if self.rank == 0:  # its store ends with it
                time.sleep(1.5 * self.interval)

    # --- the thread that talks to the store ---------------------------------------------------------------------------

    def _beat(self) -> None:
        """Set this rank's key, read the others', judge; until the end."""
        try:
            watch = Watch(self.rank, self.size, self._connect(), self.host, self.interval)
            while not self._closed.is_set():
                writing = 0.0 if (since := self.writes_since) is None else time.monotonic() - since
                watch.publish(self.place, self._failure, writing, self.collectives())
                if self._failure is not None:
                    self._published.set()
                verdict = watch.read()
                self._rounds += 1
                if verdict is not None:
                    self._conclude(verdict, watch)
                self._judge(watch)
                self._closed.wait(self.interval)
            watch.publish((Phase.left, self.place[1]), None)
        except RuntimeError as error:  # torch's DistError: the store is gone
            if not self._is_leaving:
                self._end_without_store(
                    f"rank 0 (host {self._first_host}) is gone: its store at port {self.port} does not answer "
                    f"({type(error).__name__})"
                )

    def _connect(self) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        # With a time-out above that of the heartbeat, _watch_store speaks first
        seconds = max(2 * self.timeout_seconds, CONNECT_SECONDS)
        store = TCPStore(self.address, self.port, is_master=False, wait_for_workers=False,
                         timeout=datetime.timedelta(seconds=seconds))  # fmt: skip
        return PrefixStore(f"llmtrain/heartbeat/{self.generation}", store)

    def _judge(self, watch: "Watch") -> None:
        failed = watch.failed()
        if failed is not None:
            self._decide(failed, watch, absent=1)
        positions = watch.positions()
        self._first_host = next((each.host for each in positions if each.rank == 0), self._first_host)
        behind_seconds = watch.behind_seconds(positions)

        def find(limit: float) -> Verdict | None:
            is_watcher = self.rank == 0  # the others know rank 0 alone
            return judge(positions, limit, behind_seconds) if is_watcher else find_silence(positions, limit)

        if (verdict := find(self.timeout_seconds)) is not None:
            absent = len(verdict.ranks) if verdict.is_silence else 0
            self._decide(f"{verdict.text}; {self._remedy()}", watch, absent=absent, about=verdict.ranks)
        warning = find(self.timeout_seconds / 2)
        if warning is not None and self._is_new(warning):
            self._report(f"warning: {warning.text}; without progress the run ends after {self.timeout_seconds:g} s "
                         "(distributed.timeout_seconds)")  # fmt: skip

    def _remedy(self) -> str:
        stacks = "" if self.run_dir is None else f"stacks of all ranks: {self.run_dir}/ranks/stacks-*.txt; "
        return (f"{stacks}distributed.timeout_seconds={self.timeout_seconds:g} ends the run; a longer one waits for a "
                "phase that takes its time")  # fmt: skip

    def _is_new(self, warning: Verdict) -> bool:
        """True once for each group of ranks and phase that is warned of."""
        is_new = warning.topic not in self._warned
        self._warned.add(warning.topic)
        return is_new

    def _decide(self, text: str, watch: "Watch", *, absent: int, about: Sequence[int] = ()) -> None:
        """End the job: the first rank that decides reports, all others follow its verdict."""
        winner = watch.propose(text)
        if winner == text:
            self._report(text)
        is_own = winner == text
        self._conclude(winner, watch, is_shown=is_own, absent=absent, about=about if is_own else ())

    def _conclude(self, text: str, watch: "Watch", *, is_shown: bool = False, absent: int = 0,
                  about: Sequence[int] = ()) -> None:  # fmt: skip
        """Write the stacks, tell the supervisor, and end this rank; the one with the store waits for the others.

        ``absent``: ranks that cannot answer.  ``about``: those that the verdict is about.
        """
        with self._ending:
            self._dump(text)
            kind = Kind.consequence if text.startswith(FAILED_RANK) else Kind.verdict
            if self.supervision is not None:
                self.supervision.report_failure(text, kind=kind, is_shown=is_shown, about=about)
            with contextlib.suppress(RuntimeError):
                watch.acknowledge(self.size - absent, wait_seconds=3 * self.interval + 2 if self.rank == 0 else 0)
            _exit()

    # --- the thread that watches the first ----------------------------------------------------------------------------

    def _watch_store(self) -> None:
        """End this rank when the store has not answered for too long, or its supervisor is gone.

        A stopped process neither answers nor closes its connections; requests to its store wait.
        """
        clock = Clock(self.interval)
        parent = os.getppid() if self.supervision is not None and self.supervision.folder is not None else None
        rounds, since = -1, 0.0
        while not self._closed.wait(self.interval):
            now = clock.now()
            if rounds != self._rounds:
                rounds, since = self._rounds, now
            if parent is not None and os.getppid() != parent:
                self._end_without_store("the supervisor of the ranks is gone")
            limit = self.timeout_seconds if rounds > 0 else max(self.timeout_seconds, CONNECT_SECONDS)
            if now - since > limit + self.interval:
                self._end_without_store(
                    f"no answer from rank 0 (host {self._first_host}) and its store at port {self.port} for "
                    f"{round(now - since)} s; {self._remedy()}", Kind.verdict,
                )  # fmt: skip

    def _end_without_store(self, text: str, kind: Kind = Kind.consequence) -> None:
        """End this rank without an agreement with the others; rank 1 writes the run's log."""
        if kind is Kind.consequence:  # the main thread may know more, and may be about to end
            time.sleep(LOST_SECONDS)
        if self._closed.is_set() or (self._is_leaving and kind is Kind.consequence):
            return
        with self._ending:
            self._report(text, logs=self.rank == min(1, self.size - 1))
            self._dump(text)
            if self.supervision is not None:
                self.supervision.report_failure(text, kind=kind, is_shown=True, about=(0,))
            _exit()

    # --- both ---------------------------------------------------------------------------------------------------------

    def _report(self, text: str, *, logs: bool = True) -> None:
        with contextlib.suppress(Exception):  # of a display that is being closed
            self.show(text)
        if self.run_dir is not None and logs:
            with contextlib.suppress(OSError, ValueError):
                AppendedFile(self.run_dir / LOG).append(visible(text) + "\n")

    def _dump(self, text: str) -> None:
        """Write the stacks of all threads to the run's folder ``ranks``, or to stderr while there is no run."""
        with contextlib.suppress(OSError, ValueError):
            if self.run_dir is None:
                faulthandler.dump_traceback(file=2, all_threads=True)
                return
            folder = self.run_dir / "ranks"
            folder.mkdir(exist_ok=True)
            with os.fdopen(open_own(folder / f"stacks-{self.rank:05d}.txt"), "w", encoding="utf-8") as file:
                write_stacks(file, f"{text}\nrank {self.rank} on host {self.host}, {self.place[0].value} at step "
                                   f"{self.place[1]:,}\n\n")  # fmt: skip


FAILED_RANK = "failed: "  # begins the verdict about a rank that ended with an error of its own


class Watch:
    """A rank's connection to the store, and what it knows of the others."""

    def __init__(self, rank: int, size: int, store: Any, host: str, interval: float) -> None:
        self.rank, self.size, self.store, self.host = rank, size, store, host
        self.clock = Clock(interval)
        self.beats = 0
        self._place: Any = None
        self._since = self.clock.now()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last beat, and when it was new
        self._last: Key | None = None  # progress of the last ranks, and since when
        self._last_since = self.clock.last
        self._is_ready = rank == 0
        self._others = range(size) if rank == 0 else range(1)
        if rank == 0:
            self.store.multi_set([VERDICT, *map(beat_key, range(1, size))], [NONE] + [""] * (size - 1))

    def publish(
        self, place: tuple[Phase, int], failure: str | None, writing: float = 0.0, collectives: int = 0
    ) -> None:
        """Set this rank's key; ``place`` is another object after each mark."""
        now = self.clock.now()
        if place is not self._place:
            self._place, self._since = place, now
        self.beats += 1
        phase, step = place
        values = f"{now - self._since:.1f}|{writing:.1f}|{collectives}"
        text = f"{self.beats}|{phase.name}|{step}|{values}|{self.host}|{failure or ''}"
        self.store.set(beat_key(self.rank), text)

    def read(self) -> str | None:
        """Read the keys of the watched ranks; returns the verdict, if there is one."""
        if not self._is_ready:
            self._is_ready = bool(self.store.check([VERDICT, beat_key(0)]))
            if not self._is_ready:
                return None
        keys = [VERDICT, *map(beat_key, self._others)]
        values: list[bytes] = []
        for first in range(0, len(keys), CHUNK):
            values += self.store.multi_get(keys[first : first + CHUNK])
        now = self.clock.now()
        for rank, value in zip(self._others, values[1:], strict=True):
            text = value.decode("utf-8", errors="replace")
            if rank not in self._seen or self._seen[rank][0] != text:
                self._seen[rank] = text, now
        verdict = values[0].decode("utf-8", errors="replace")
        return None if verdict == NONE else verdict

    def positions(self) -> list[Position]:
        """The places of the watched ranks, by their last heartbeats."""
        now = self.clock.last
        return [self._position(rank, text, now - moment) for rank, (text, moment) in self._seen.items()]

    def behind_seconds(self, positions: list[Position]) -> float:
        """The time for which others have been ahead of the last ranks without progress of these."""
        key = last_key(positions)
        if key != self._last:
            self._last, self._last_since = key, self.clock.last
        return self.clock.last - self._last_since

    def _position(self, rank: int, text: str, silence: float) -> Position:
        _, phase, step, seconds, writing, collectives, host, _ = [*text.split("|", 7), *[""] * 8][:8]
        if phase not in Phase.__members__:
            return Position(rank, "", Phase.start, 0, 0.0, silence)  # it has sent none yet
        place = Phase[phase], int(step), float(seconds)
        return Position(rank, host, *place, silence, float(writing), int(collectives))

    def failed(self) -> str | None:
        """The message of a rank that has ended with an error of its own."""
        for rank, (text, _) in self._seen.items():
            failure = text.split("|", 7)[7] if text.count("|") >= 7 else ""
            if failure and rank != self.rank:
                return f"{FAILED_RANK}rank {rank} on host {text.split('|', 5)[4]} ended with an error: {failure}"
        return None

    def propose(self, text: str) -> str:
        """Make ``text`` the verdict unless there is one; returns the verdict."""
        return str(self.store.compare_set(VERDICT, NONE, text).decode("utf-8", errors="replace"))

    def acknowledge(self, ranks: int, wait_seconds: float) -> None:
        """Count this rank among those that know the verdict; wait for ``ranks`` of them."""
        deadline = time.monotonic() + wait_seconds
        number = self.store.add("acknowledged", 1)
        while number < ranks and time.monotonic() < deadline:
            time.sleep(0.05)
            number = self.store.add("acknowledged", 0)


def beat_key(rank: int) -> str:
    return f"beat/{rank}"


class Clock:
    """Seconds that a thread has been running: gaps while its process was stopped, or did not get the GIL, count little.

    So a job that was suspended as a whole does not find all its ranks silent when it is continued.
    """

    def __init__(self, interval: float) -> None:
        self.largest = 3 * interval
        self.last = 0.0
        self._moment = time.monotonic()

    def now(self) -> float:
        moment = time.monotonic()
        self.last += min(moment - self._moment, self.largest)
        self._moment = moment
        return self.last


def write_stacks(file: IO[str], header: str) -> None:
    """Write the stacks of all threads of this process."""
    file.truncate(0)
    file.write(header)
    file.flush()
    faulthandler.dump_traceback(file=file, all_threads=True)


def _exit() -> None:
    """End the process; what is in the buffers is written unless the main thread holds their locks."""
    thread = threading.Thread(target=_flush, daemon=True)
    thread.start()
    thread.join(1.0)
    os._exit(FAILED)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
