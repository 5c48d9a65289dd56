"""A supervisor for tests: ``supervise.py PROCESSES RESTARTS PROGRAM ARGUMENT…``; prints its own imports of torch."""

import os
import sys
from pathlib import Path

from llmtrain.distributed.launch import Patience, supervise

processes, restarts, *program = sys.argv[1:]
command = [sys.executable, *program]


def resume(directory: Path) -> list[str]:
    return ["env", f"RESUMED={directory}", *command]


grace = float(os.environ.get("GRACE", "1"))
status = supervise(
    command, int(processes), restarts=int(restarts), resume_command=resume, patience=Patience(grace=grace)
)
print("imported torch" if "torch" in sys.modules else "without torch", flush=True)
sys.exit(status)
