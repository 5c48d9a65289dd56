"""A rank for tests of heartbeats: ``beating_program.py BEHAVIOUR ODD RUN_DIR TIMEOUT``; ranks meet in a TCPStore.

Rank 0 has the store.  The rank ODD behaves as named; the others wait for it in all_reduce.  Without arguments it forks
ranks, as standard input asks, a JSON object a line: importing torch takes seconds.
"""

import datetime
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from llmtrain.base.world import Alone
from llmtrain.distributed.heartbeat import Heartbeat
from llmtrain.distributed.phases import Phase
from llmtrain.distributed.rank_exit import abandon, leave, redirect_output
from llmtrain.distributed.supervision import Supervision


def run(behaviour: str, odd: int, folder: Path, timeout: float) -> None:
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    wait = datetime.timedelta(seconds=60)
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = TCPStore(address, port, is_master=rank == 0, wait_for_workers=False, timeout=wait)
    supervision = Supervision.of(os.environ, rank)
    redirect_output(folder / "ranks", rank, size)
    heartbeat = Heartbeat(address, port, rank, size, timeout_seconds=timeout, run_dir=folder, supervision=supervision)
    heartbeat.start()
    if behaviour in ("leave", "collective", "loop"):
        collective(behaviour, folder, rank == odd, PrefixStore("ranks", store), rank, size, supervision, heartbeat)
    store.set(f"here-{rank}", "")
    store.wait([f"here-{other}" for other in range(size)])
    for step in range(3):
        heartbeat.mark(Phase.data, step)
        time.sleep(0.05)
        heartbeat.mark(Phase.reduce, step)
    if rank == odd:
        heartbeat.mark(Phase.data, 3)
        (folder / "odd").write_text(str(time.time()))
        misbehave(behaviour, timeout, port, heartbeat, supervision)
    heartbeat.mark(Phase.data, 3)
    heartbeat.mark(Phase.reduce, 3)
    if behaviour == "progress":
        store.wait(["done"])
        heartbeat.prepare_to_leave()
        store.set(f"left-{rank}", "")
        if rank == 0:
            store.wait([f"left-{other}" for other in range(size)])
        heartbeat.close()
        return
    time.sleep(120)  # in a collective


def misbehave(behaviour: str, timeout: float, port: int, heartbeat: Heartbeat, supervision: Supervision) -> None:
    if behaviour == "sleep":
        time.sleep(120)
    time.sleep(0.6)  # a heartbeat with this place
    if behaviour == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "error":
        print("KeyError: 'weights'", file=sys.stderr, flush=True)
        abandon(KeyError("weights"), supervision=supervision, heartbeat=heartbeat)
    if behaviour == "gil":  # a function in C that never gives way to another thread
        import ctypes

        ctypes.PyDLL(None).sleep(120)
    if behaviour == "progress":  # slower than the time-out, with marks on its way
        for _ in range(12):
            heartbeat.mark(Phase.evaluate, 3)
            time.sleep(timeout / 8)
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        store.set("done", "")


class Ranks(Alone):
    """A world of which only the barrier is needed."""

    def barrier(self) -> None:
        dist.barrier()


def collective(
    behaviour: str,
    folder: Path,
    is_odd: bool,
    store: Any,
    rank: int,
    size: int,
    supervision: Supervision,
    heartbeat: Heartbeat,
) -> None:
    """The end of ranks with a process group: orderly with status 75, or after an error of one of them."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    numbers = torch.ones(10)
    try:
        for step in range(3 if behaviour != "loop" else 10**6):
            if step == (2 if behaviour != "loop" else 60):  # after some heartbeats of each
                (folder / f"running-{rank}").touch()
            if behaviour == "collective" and is_odd and step == 2:
                raise KeyError("weights")
            heartbeat.mark(Phase.reduce, step)
            dist.all_reduce(numbers)
            time.sleep(0.05 * (behaviour == "loop"))
    except Exception as error:
        traceback.print_exc()
        print("unwritten", end="")  # in the buffer
        abandon(error, supervision=supervision, heartbeat=heartbeat)
    sys.exit(leave(75, Ranks(), heartbeat))


def serve() -> None:
    """Fork ranks and tell their exit statuses."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if pid else None, flush=True)
        elif (pid := os.fork()) == 0:
            try:
                errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(errors, 1)
                os.dup2(errors, 2)
                os.environ.update(request["environment"])
                start(*request["arguments"])
                os._exit(0)
            except SystemExit as error:  # as at the end of a program, without torch's own at-exit work
                os._exit(error.code)
            except BaseException:
                traceback.print_exc()
                os._exit(3)
        else:
            print(pid, flush=True)


def start(behaviour: str, odd: str, folder: str, timeout: str) -> None:
    run(behaviour, int(odd), Path(folder), float(timeout))


if len(sys.argv) > 1:
    start(*sys.argv[1:])
else:
    serve()
