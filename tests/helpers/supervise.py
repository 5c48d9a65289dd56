"""A supervisor for tests: ``supervise.py PROCESSES RESTARTS PROGRAM ARGUMENT…``; prints its own imports of torch."""

import os
import signal
import sys
from pathlib import Path

from llmtrain.distributed.hostfile import read_hostfile
from llmtrain.distributed.launch import Patience, supervise
from llmtrain.distributed.remote_rank import SSH

processes, restarts, *program = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
command = [sys.executable, *program]


def resume(directory: Path) -> list[str]:
    return ["env", f"RESUMED={directory}", *command]


status = supervise(
    command,
    int(processes),
    restarts=int(restarts),
    resume_command=resume,
    hosts=read_hostfile(Path(os.environ["HOSTFILE"])) if "HOSTFILE" in os.environ else (),
    ssh=os.environ.get("CONNECTION", SSH),
    patience=Patience(grace=float(os.environ.get("GRACE", "1"))),
)
print("imported torch" if "torch" in sys.modules else "without torch", flush=True)
sys.exit(status)
