"""A small program for tests of supervisors: ``rank_program.py BEHAVIOUR RANK FOLDER``, run as every rank.

The rank ``RANK`` behaves as named; the others are well, until that one is gone.  No torch: it starts in a tenth of a
second.
"""

import os
import signal
import sys
import time
from pathlib import Path

from llmtrain.distributed.supervision import Supervision

BEHAVIOUR, ODD, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
RANK = int(os.environ["RANK"])
SUPERVISION = Supervision.of(os.environ, RANK)
RECEIVED: list[int] = []


def catch(*numbers: int) -> None:
    for number in numbers:
        signal.signal(number, lambda received, _: RECEIVED.append(received))


def note(name: str, text: str = "") -> None:
    """Leave a file for the test, and for the other ranks."""
    path = FOLDER / f"{name}-{RANK}"
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def wait_for(name: str, rank: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not (FOLDER / f"{name}-{rank}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def work_until_stopped() -> int:
    """The loop of a run: a signal ends it with status 75."""
    while not RECEIVED:
        time.sleep(0.02)
    time.sleep(0.3)  # a second copy of the signal would be seen
    note("received", " ".join(map(str, RECEIVED)))
    return 75


def lose_connection() -> int:
    """Fail as gloo does when another rank is gone."""
    wait_for("gone", ODD)
    message = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4040"
    print(f"RuntimeError: {message}", file=sys.stderr, flush=True)
    SUPERVISION.report_failure(message, is_shown=True)
    return 1


def main() -> int:
    note("started", " ".join(f"{name}={os.environ.get(name)}" for name in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")))  # fmt: skip
    note("pid", str(os.getpid()))
    print(f"rank {RANK} begins", flush=True)
    if BEHAVIOUR == "well":
        return 0
    if BEHAVIOUR == "status":
        return int(os.environ["STATUS"]) if RANK == ODD else 75
    if BEHAVIOUR == "stop":
        catch(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        note("ready")
        return work_until_stopped()
    if BEHAVIOUR == "sleep":
        note("ready")
        time.sleep(600)
    if BEHAVIOUR == "usage":
        time.sleep(0.4 * (RANK == 0))  # the others are faster
        print("llmtrain: optimizer.lr=-1: must be positive", file=sys.stderr, flush=True)
        return 2
    if BEHAVIOUR == "usage of one":
        if RANK == ODD:
            print("llmtrain: data.path=x: no such file", file=sys.stderr, flush=True)
            return 2
        return lose_connection() if RANK != ODD else 0
    return lose_connection() if RANK != ODD and BEHAVIOUR in ("killed", "error") else misbehave()


def misbehave() -> int:
    if BEHAVIOUR == "killed":
        note("gone")
        time.sleep(0.3)  # the others' errors are seen first
        os.kill(os.getpid(), signal.SIGKILL)
    if BEHAVIOUR == "error":
        note("gone")
        time.sleep(0.3)
        print("KeyError: 'weights'", file=sys.stderr, flush=True)
        SUPERVISION.report_failure(KeyError("weights"))
        return 1
    if BEHAVIOUR == "memory":  # runs out in micro-batches of more than one sequence
        size = int(sys.argv[4]) if len(sys.argv) > 4 else 4
        note(f"size-{size}")
        if size > 1:
            error = MemoryError(f"memory ran out with {size}")
            error.smaller_micro_batch = size // 2  # type: ignore[attr-defined]
            SUPERVISION.report_failure(error)
        return int(size > 1)
    if BEHAVIOUR == "save":  # the others fail while one is writing a checkpoint
        if RANK != ODD:
            wait_for("saving", ODD)
            os.kill(os.getpid(), signal.SIGKILL)
        catch(signal.SIGTERM)
        with SUPERVISION.saving():
            note("saving")
            while not RECEIVED:
                time.sleep(0.02)
            time.sleep(2.0)  # longer than the grace time of the test
            note("saved")
        time.sleep(600)  # blocked from now on
    if BEHAVIOUR == "restart":
        directory = FOLDER / "run"
        resumed = os.environ.get("RESUMED")
        if RANK == 0 and not resumed:
            directory.mkdir()
            SUPERVISION.report_run_directory(directory)
            if os.environ["HAS_CONFIG"] == "1":
                (directory / "config.yaml").touch()
        count = FOLDER / f"count-{RANK}"
        starts = int(count.read_text()) + 1 if count.exists() else 1
        count.write_text(str(starts))
        note("run")
        wait_for("run", 0)
        note(f"start-{starts}", os.environ["WORLD_SIZE"])
        for rank in range(int(os.environ["WORLD_SIZE"])):
            wait_for(f"start-{starts}", rank)
        if RANK == ODD and starts <= int(os.environ["FAILURES"]):
            if "GOES_AWAY" in os.environ:  # the machine, for the test's connection
                (FOLDER / "off").touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return 0
    raise AssertionError(BEHAVIOUR)


sys.exit(main())
