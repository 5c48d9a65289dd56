"""Starting the ranks of a run on this machine, where no launcher has."""

import sys
from pathlib import Path

from llmtrain.base.invocation import Invocation
from llmtrain.base.process import nvidia_gpus
from llmtrain.base.ranks import find_rank, refuse_several_processes
from llmtrain.base.threads import allowed_cpus
from llmtrain.config.assemble import check_ranks
from llmtrain.distributed.hostfile import read_hostfile
from llmtrain.distributed.launch import supervise
from llmtrain.run.run import Run

PROGRAM = (sys.executable, "-P", "-m", "llmtrain")  # -P: never a package of that name in the working directory
CROWD = 4  # processes for each core, from which on more of them cannot be meant


def start_ranks(run: Run, invocation: Invocation) -> int | None:
    """Run the command as the ranks that ``distributed`` asks for; return their exit status, None for one process."""
    if not run.distributed.is_parallel:
        refuse_several_processes()
    if find_rank() is not None:
        return None
    options, hosts = run.distributed, []
    if options.hostfile is not None:
        hosts = read_hostfile(Path(options.hostfile))
        processes = sum(host.slots for host in hosts)
    else:
        processes = options.local_processes(len(nvidia_gpus()))
        check_number(processes)
    if processes == 1:
        return None
    check_ranks(run, processes)

    def resume(directory: Path) -> list[str]:
        plugins = [f"plugins=[{','.join(run.plugins)}]"] if run.plugins else []
        # a stored config starts nothing on other machines: see StoredRun.composable
        places = [f"distributed.hostfile={options.hostfile}", f"distributed.ssh={options.ssh}"] if hosts else []
        return [*PROGRAM, "resume", str(directory), *plugins, *places]

    return supervise(
        [*PROGRAM, *invocation.command[1:]], processes, restarts=options.restarts, resume_command=resume,
        has_own_threads=run.runtime.num_threads is not None, hosts=hosts, ssh=options.ssh,
    )  # fmt: skip


def check_number(processes: int) -> None:
    """Raise ValueError for more processes than this machine can run at any speed."""
    most = max(CROWD * len(allowed_cpus()), len(nvidia_gpus()))
    if processes > most:
        raise ValueError(
            f"distributed.processes={processes}: this machine has {len(allowed_cpus())} cores and {len(nvidia_gpus())} "
            f"GPUs; at most {most} processes, or other machines: distributed.hostfile=FILE"
        )
