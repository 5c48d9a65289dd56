"""A supervisor for tests: ``supervise.py PROCESSES RESTARTS PROGRAM ARGUMENT…``; prints its own imports of torch.

With LEAST it goes on with as few ranks, if MULTIPLE divides their number; it waits ABSENCE or NEEDED seconds.
"""

import os
import signal
import sys
from pathlib import Path

from llmtrain.distributed.hostfile import read_hostfile
from llmtrain.distributed.launch import Patience, supervise
from llmtrain.distributed.remote_rank import SSH
from llmtrain.distributed.roster import Fewer

processes, restarts, *program = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
command = [sys.executable, *program]


def resume(directory: Path) -> list[str]:
    return ["env", f"RESUMED={directory}", *command]


def misfit(number: int) -> str | None:
    multiple = int(os.environ.get("MULTIPLE", "1"))
    return f"{number} is no multiple of {multiple}" if number % multiple else None


fewer = Fewer(
    int(os.environ["LEAST"]) if "LEAST" in os.environ else None, misfit, "ON_GPUS" in os.environ,
    float(os.environ.get("ABSENCE", "2")), float(os.environ.get("NEEDED", "2")),
)  # fmt: skip
status = supervise(
    command,
    int(processes),
    restarts=int(restarts),
    resume_command=resume,
    with_micro_batch=lambda size: [str(size)],
    hosts=read_hostfile(Path(os.environ["HOSTFILE"])) if "HOSTFILE" in os.environ else (),
    ssh=os.environ.get("CONNECTION", SSH),
    patience=Patience(grace=float(os.environ.get("GRACE", "1"))),
    fewer=fewer,
)
print("imported torch" if "torch" in sys.modules else "without torch", flush=True)
sys.exit(status)
