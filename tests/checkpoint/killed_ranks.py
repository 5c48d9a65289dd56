"""Two ranks that save together, forked by the process that runs this file; one of them meets its end in the save.

``python -m tests.checkpoint.killed_ranks kill FOLDER``: rank 0, then rank 1, is killed at its first call of the
operating system that changes a directory or syncs a file, at its second, and so on, until none is left.
``… full FOLDER``: rank 1 cannot write files of more than some bytes.  Prints a line of JSON for each attempt.
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoint.divisions import held, held_state, save, saver_of, state_of, whole_model
from tests.helpers.worlds import SocketWorld

CALLS = ("mkdir", "fsync", "rename", "unlink", "rmdir", "chmod")
FAILED = 3


def kill_at(number: int) -> None:
    """Kill this process at the call of that number, from 1 on, of those in ``CALLS``."""
    left = [number]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return counting

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def limit_files() -> None:
    """Let no file of this process grow beyond some bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))


def save_second_step(run_dir: Path, rank: int, sockets: list[socket.socket]) -> int:
    """One rank's part in the save of step 2; the exit status."""
    model = whole_model(2.0)
    tensors, places = held(model, "rows", 2, rank)
    with saver_of(run_dir, SocketWorld(rank, 2, sockets), places, keep_last=1) as saver:
        saver.begin(tensors, held_state(state_of(model), places), {"step": 2}, {})
        saved = saver.collect(wait=True)
    assert saved is not None
    (run_dir / f"error-{rank}.txt").write_text(
        "" if saved.error is None else f"{type(saved.error).__name__}: {saved.error}"
    )
    return 0 if saved.error is None else FAILED


def attempt(run_dir: Path, victim: int, harm: Callable[[], None]) -> list[int]:
    """Fork two ranks, of which ``victim`` has ``harm`` done to it; return their exit statuses."""
    pair = socket.socketpair()
    ranks = []
    for rank in (0, 1):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                pair[1 - rank].close()  # so that the end of the other is seen
                if rank == victim:
                    harm()
                status = save_second_step(run_dir, rank, [pair[rank]])
            finally:
                os._exit(status)
        ranks.append(pid)
    for end in pair:
        end.close()
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]


def main(kind: str, folder: Path) -> None:
    """Make the attempts."""
    if (pid := os.fork()) == 0:  # the savers' threads are not in the process that forks
        save(folder / "first", "rows", 2, value=1.0)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    for victim in (0, 1):
        for number in range(1, 200):
            run_dir = folder / f"{kind}-{victim}-{number}"
            shutil.copytree(folder / "first", run_dir)
            harm = limit_files if kind == "full" else lambda number=number: kill_at(number)
            statuses = attempt(run_dir, victim, harm)
            print(json.dumps({"run": str(run_dir), "victim": victim, "statuses": statuses}), flush=True)
            if kind == "full" or statuses[victim] != -signal.SIGKILL:
                break


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
