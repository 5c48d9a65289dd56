"""Stops by signal: finish the step, save, exit with status 75."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # sent by a scheduler ahead of its SIGTERM: SLURM's --signal=USR1@300


class StopRequest:
    """A request to stop, set by the first signal; a second one ends the process, except a SIGTERM after a warning."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._received: list[int] = []
        self.previous: dict[int, Any] = {}  # the handlers installed before

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: record it, or end the process at the second one."""
        announced = number in STOPPING and all(earlier in WARNINGS for earlier in self._received)
        if self._received and not announced:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # a live display hides the cursor
            os._exit(128 + number)
        self._received.append(number)
        self.signal_name = self.signal_name or signal.Signals(number).name

    def pass_on(self) -> None:
        """Call the previous handlers with the received signals, after the run has saved."""
        for number in self._received:
            handler = self.previous.get(number)
            if callable(handler) and handler is not signal.default_int_handler:
                handler(number, None)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 during a run in the main thread.

    Other threads cannot catch signals.  A previous handler (of a cluster launcher, which requeues the job) is called
    after the run has saved and stopped.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    request.previous = {number: signal.signal(number, request.handle) for number in (*STOPPING, *WARNINGS)}
    try:
        yield request
    finally:
        for number, handler in request.previous.items():
            signal.signal(number, handler)
    request.pass_on()
