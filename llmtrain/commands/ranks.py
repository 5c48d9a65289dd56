"""Starting the ranks of a run where no launcher has, and resuming it where a launcher starts them again."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.base.format import visible
from llmtrain.base.invocation import Invocation
from llmtrain.base.process import nvidia_gpus
from llmtrain.base.ranks import refuse_several_processes
from llmtrain.base.streams import flush_standard_output, write_to_stderr
from llmtrain.base.threads import allowed_cpus
from llmtrain.config.assemble import check_ranks
from llmtrain.distributed.hostfile import Host, read_hostfile
from llmtrain.distributed.launch import supervise, usable_directory
from llmtrain.distributed.options import Distributed
from llmtrain.distributed.roster import Fewer
from llmtrain.distributed.session import is_rank, meet
from llmtrain.distributed.torchrun import START
from llmtrain.run.run import Run
from llmtrain.run.stored_run import StoredRun

PROGRAM = (sys.executable, "-P", "-m", "llmtrain")  # -P: never a package of that name in the working directory
CROWD = 4  # processes for each core, from which on more of them cannot be meant


def start_ranks(run: Run, invocation: Invocation) -> int | None:
    """Run the command as the ranks that ``distributed`` asks for; return their exit status, None for one process.

    Where a launcher has started this process as a rank, and an earlier start of it has made the run directory, the
    command that resumes it takes the place of this one.
    """
    if not run.distributed.is_parallel:
        refuse_several_processes()
    if is_rank():
        resume_earlier_start(run, invocation)
        return None
    options = run.distributed
    hosts = [] if options.hostfile is None else read_hostfile(Path(options.hostfile))
    if hosts:
        processes = sum(host.slots for host in hosts)
    else:
        processes = options.local_processes(len(nvidia_gpus()))
        check_number(processes)
    if processes == 1:
        return None
    check_ranks(run, processes)
    places = [f"distributed.hostfile={options.hostfile}", f"distributed.ssh={options.ssh}"] if hosts else []
    return supervise(
        [*PROGRAM, *invocation.command[1:]], processes, restarts=options.restarts,
        resume_command=lambda directory: resume_command(run, directory, places),
        with_micro_batch=lambda size: with_micro_batch(run, size),
        has_own_threads=run.runtime.num_threads is not None, hosts=hosts, ssh=options.ssh,
        fewer=fewer_ranks(run, processes, hosts),
    )  # fmt: skip


def resume_command(run: Run, directory: Path, places: Sequence[str] = ()) -> list[str]:
    """The command that resumes ``run``.

    A stored config starts nothing on other machines, and names no plug-ins: see StoredRun.composable.
    """
    plugins = [f"plugins=[{','.join(run.plugins)}]"] if run.plugins else []
    return [*PROGRAM, "resume", str(directory), *plugins, *places]


def with_micro_batch(run: Run, size: int) -> list[str]:
    """The overrides for micro-batches of ``size`` sequences, and steps as before."""
    fixed = ["accumulation=fixed", f"accumulation.batch_size={run.accumulation.batch_size_at(0, 0)}"]
    return [*(fixed if run.accumulation.is_probed else ()), f"accumulation.micro_batch_size={size}"]


def resume_earlier_start(run: Run, invocation: Invocation) -> None:
    """Replace this process by one that resumes the run which an earlier start of the same ranks has made, if any."""
    start = meet(run.distributed, run.run_dir, run.output_dir, usable_directory)
    if start is None or start.run_directory is None:
        return
    directory = Path(start.run_directory)
    if isinstance(invocation.stored, StoredRun) and invocation.stored.directory.path.absolute() == directory:
        return
    write_to_stderr(visible(f"llmtrain: a later start of this job: resumes {directory}"))
    flush_standard_output()
    os.environ[START] = start.text()
    os.execv(sys.executable, resume_command(run, directory))


def fewer_ranks(run: Run, processes: int, hosts: Sequence[Host]) -> Fewer:
    """The terms on which a restart has fewer ranks.  Raises ValueError where there are more than ``processes``."""
    options = run.distributed
    on_gpus = run.runtime.device != "cpu" and (bool(hosts) or len(nvidia_gpus()) >= processes)
    check_least(options, processes)
    if options.min_processes is not None and not hosts and not on_gpus:
        write_to_stderr(
            f"llmtrain: distributed.min_processes={options.min_processes} has no use here: on one machine a process is "
            "left out only with its GPU"
        )

    def misfit(number: int) -> str | None:
        try:
            check_ranks(run, number)
            run.distributed.mesh(number)
        except ValueError as error:
            return str(error)
        return None

    seconds = options.timeout_seconds
    return Fewer(options.min_processes, misfit, on_gpus, min(Fewer.absence_seconds, seconds), seconds)


def check_least(options: Distributed, processes: int) -> None:
    """Raise ValueError for a least number of processes above their number."""
    if options.min_processes is not None and options.min_processes > processes:
        raise ValueError(
            f"distributed.min_processes={options.min_processes}: the run has {processes} processes; at most as many, "
            "or null: all of them"
        )


def check_number(processes: int) -> None:
    """Raise ValueError for more processes than this machine can run at any speed."""
    most = max(CROWD * len(allowed_cpus()), len(nvidia_gpus()))
    if processes > most:
        raise ValueError(
            f"distributed.processes={processes}: this machine has {len(allowed_cpus())} cores and {len(nvidia_gpus())} "
            f"GPUs; at most {most} processes, or other machines: distributed.hostfile=FILE"
        )
