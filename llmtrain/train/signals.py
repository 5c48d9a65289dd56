"""Stopping on request: finish the step, save, exit 75."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # a scheduler's, ahead of its SIGTERM: SLURM's --signal=USR1@300


class StopRequest:
    """Set by the first signal.  A second one ends the process at once, but for the SIGTERM that a warning announced."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._received: list[int] = []
        self.before: dict[int, Any] = {}  # the handlers that were there

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        announced = number in STOPPING and all(earlier in WARNINGS for earlier in self._received)
        if self._received and not announced:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # a live display hides the cursor
            os._exit(128 + number)
        self._received.append(number)
        self.signal_name = self.signal_name or signal.Signals(number).name

    def pass_on(self) -> None:
        """Call the handlers that were there before with the signals that came, now that the run has saved."""
        for number in self._received:
            handler = self.before.get(number)
            if callable(handler) and handler is not signal.default_int_handler:
                handler(number, None)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 for the duration of a run, where it is the main thread's.

    No other thread can catch any.  A handler that was there before (a cluster launcher's, which requeues the job) is
    called when the run has saved and left.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    request.before = {number: signal.signal(number, request.handle) for number in (*STOPPING, *WARNINGS)}
    try:
        yield request
    finally:
        for number, handler in request.before.items():
            signal.signal(number, handler)
    request.pass_on()
