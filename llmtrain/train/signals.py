"""Stops by signal: finish the step, save, exit with status 75."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from llmtrain.base.streams import write_to_stderr

STOPPING = (signal.SIGTERM, signal.SIGINT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # sent by a scheduler ahead of its SIGTERM: SLURM's --signal=USR1@300
HANGUP = signal.SIGHUP  # the terminal is gone: sent by its shell and again by the kernel, before or after a SIGTERM


AGAIN = "exits at once and loses the steps since the last checkpoint"


class StopRequest:
    """A request to stop, set by the first signal.

    A second one ends the process, except a SIGTERM after a warning and a SIGHUP after anything.  ``doubled_seconds``: a
    signal that comes again within this time is the same one, as for a rank whose supervisor passes on what a scheduler
    has sent to every process of the job.
    """

    def __init__(self, doubled_seconds: float = 0.0) -> None:
        self.doubled_seconds = doubled_seconds
        self._moments: dict[int, float] = {}  # by signal: its last arrival
        self.signal_name: str | None = None
        self._received: list[int] = []
        self.previous: dict[int, Any] = {}  # the handlers installed before
        self.show: Callable[[str], bool] = lambda text: False  # of a display; returns whether it can show the text

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: record it and say so, or end the process at the second one."""
        moment = time.monotonic()
        is_doubled = moment - self._moments.get(number, -math.inf) < self.doubled_seconds
        self._moments[number] = moment
        if is_doubled or (number == HANGUP and self._received):
            return
        announced = number in STOPPING and all(earlier in (*WARNINGS, HANGUP) for earlier in self._received)
        if self._received and not announced:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # a live display hides the cursor
            os._exit(128 + number)
        self._received.append(number)
        name = signal.Signals(number).name
        if self.signal_name is not None:
            self.notify(f"{name}: the run stops already, after {self.signal_name}; a further signal {AGAIN}")
            return
        self.signal_name = name
        is_announcing = number in (*WARNINGS, HANGUP)
        second = "SIGTERM or SIGINT may follow, any other signal" if is_announcing else "a second signal"
        self.notify(f"{name}: the run stops and saves after this step or evaluation batch; {second} {AGAIN}")

    def notify(self, text: str) -> None:
        """Show ``text`` at once: the step may take long."""
        if not self.show(text):
            write_to_stderr(text)

    def pass_on(self) -> None:
        """Call the previous handlers with the received signals, after the run has saved."""
        for number in self._received:
            handler = self.previous.get(number)
            if callable(handler) and handler is not signal.default_int_handler:
                handler(number, None)


@contextlib.contextmanager
def stop_on_signals(doubled_seconds: float = 0.0) -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 during a run in the main thread.

    A SIGHUP that is ignored stays so: ``nohup`` started the program.  Other threads cannot catch signals.  A previous
    handler (of a cluster launcher, which requeues the job) is called after the run has saved and stopped.
    ``doubled_seconds`` is that of :class:`StopRequest`.
    """
    request = StopRequest(doubled_seconds)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = [*STOPPING, *WARNINGS]
    if signal.getsignal(HANGUP) is not signal.SIG_IGN:
        caught.append(HANGUP)
    request.previous = {number: signal.signal(number, request.handle) for number in caught}
    try:
        yield request
    finally:
        for number, handler in request.previous.items():
            signal.signal(number, handler)
    request.pass_on()
