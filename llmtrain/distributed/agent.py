"""The agent of a rank on another machine than its supervisor: ``python -m llmtrain.distributed.agent``.

Standard input has the job as a JSON object in one line, then ``signal N`` lines; its end, that of the connection, ends
the rank.  Standard output reports what the rank does, standard error is the rank's output.  No torch is imported.
"""

import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmtrain.base.invocation import FAILED
from llmtrain.distributed.rank_process import LocalRank, share_threads
from llmtrain.distributed.supervision import FOLDER

POLL_SECONDS = 0.1
GRACE_SECONDS = 4.0  # between SIGTERM and SIGKILL, once the connection is gone
SAVING_SECONDS = 300.0  # … while the rank writes a checkpoint


def main() -> int:
    """Run one rank to its end; returns 0 if its exit status could be reported."""
    for number in (signal.SIGHUP, signal.SIGPIPE):  # the connection is gone: standard input says so, too
        signal.signal(number, signal.SIG_IGN)
    connection = Connection()
    line = connection.read_line()
    if not line:
        return FAILED
    job: dict[str, Any] = json.loads(line)
    folder = Path(tempfile.mkdtemp(prefix="llmtrain-rank-"))
    environment = os.environ | job["environment"] | {FOLDER: str(folder)}
    if job["shares_threads"]:
        share_threads(environment, int(environment["LOCAL_WORLD_SIZE"]))
    try:
        rank = LocalRank(job["rank"], job["command"], environment, folder, output=2)
        return watch(rank, connection)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def watch(rank: LocalRank, connection: "Connection") -> int:
    """Pass signals on and report changes until the rank has ended."""
    reported: dict[str, Any] = {}
    while True:
        status = rank.poll()
        failure, directory = rank.failure(), rank.run_directory()
        report = {
            "is_saving": rank.is_saving(), "run_directory": str(directory) if directory else None,
            "failure": failure.text() if failure else None, "status": status,
        }  # fmt: skip
        if report != reported:
            connection.report(report)
            reported = report
        if status is not None:
            return 0
        for number in connection.wait(POLL_SECONDS):
            rank.send_signal(number)
        if connection.ended is not None:
            _end(rank, time.monotonic() - connection.ended)


def _end(rank: LocalRank, seconds: float) -> None:
    """End a rank whose supervisor has been gone for ``seconds``."""
    limit = SAVING_SECONDS if rank.is_saving() else GRACE_SECONDS
    if seconds > limit:
        rank.send_signal(signal.SIGKILL)


class Connection:
    """Standard input and output, to the supervisor."""

    def __init__(self) -> None:
        self.ended: float | None = None
        self._bytes = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)

    def read_line(self) -> bytes:
        """Wait for the first line; b"": the connection has ended."""
        while b"\n" not in self._bytes:
            if not (data := os.read(0, 65536)):
                return b""
            self._bytes += data
        line, _, self._bytes = self._bytes.partition(b"\n")
        return line

    def wait(self, seconds: float) -> list[int]:
        """Wait for signals; a SIGTERM is the last one when the connection has ended."""
        if self.ended is not None:
            time.sleep(seconds)
            return []
        if not self._selector.select(seconds):
            return []
        data = os.read(0, 4096)
        if not data:
            self.ended = time.monotonic()
            return [signal.SIGTERM]
        *lines, self._bytes = (self._bytes + data).split(b"\n")
        return [int(line.split()[1]) for line in lines if line.startswith(b"signal ")]

    def report(self, values: dict[str, Any]) -> None:
        """Write a line to the supervisor, if it is still there."""
        try:
            os.write(1, json.dumps(values).encode() + b"\n")
        except OSError:
            self.ended = self.ended or time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
