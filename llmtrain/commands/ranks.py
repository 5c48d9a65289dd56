"""Starting the ranks of a run on this machine, where no launcher has."""

import sys
from pathlib import Path

from llmtrain.base.invocation import Invocation
from llmtrain.base.process import nvidia_gpus
from llmtrain.base.ranks import find_rank
from llmtrain.config.assemble import check_ranks
from llmtrain.distributed.launch import supervise
from llmtrain.run.run import Run

PROGRAM = (sys.executable, "-m", "llmtrain")


def start_ranks(run: Run, invocation: Invocation) -> int | None:
    """Run the command as the ranks that ``distributed`` asks for; return their exit status, None for one process."""
    if find_rank() is not None:
        return None
    processes = run.distributed.local_processes(len(nvidia_gpus()))
    if processes == 1:
        return None
    check_ranks(run, processes)

    def resume(directory: Path) -> list[str]:
        return [*PROGRAM, "resume", str(directory), *([f"plugins=[{','.join(run.plugins)}]"] if run.plugins else [])]

    return supervise(
        [*PROGRAM, *invocation.command[1:]], processes, restarts=run.distributed.restarts, resume_command=resume,
        has_own_threads=run.runtime.num_threads is not None,
    )  # fmt: skip
