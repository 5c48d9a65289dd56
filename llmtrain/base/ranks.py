"""Launchers that start one command several times, as the ranks of one job, recognised by their environment.

Importing this module does not import torch.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

PORT = 29500  # torchrun's, where nothing tells one job of the machine from another
LOWEST_PORT, PORTS = 10_000, 20_000  # below those that the kernel gives to clients


@dataclass(frozen=True)
class RankPlace:
    """The place of this process among the ranks of its job."""

    launcher: str
    rank: int
    size: int
    local_rank: int  # among those of this machine
    local_size: int
    address: str  # of rank 0's machine
    port: int  # on which rank 0 will wait for the others


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher tells each process its place; "" for what it does not tell."""

    name: str
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""
    job: str = ""  # a text that is the same for all ranks of a job, and different for another job


# In this order: mpirun starts its helpers on other nodes by srun, and the ranks inherit the variables of both.
LAUNCHERS = (
    # accelerate, deepspeed and the PyTorch operators of Kubernetes set these names, too, and llmtrain itself
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Launcher("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
             "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE"),
    Launcher("mpirun (MVAPICH)", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
             "MV2_COMM_WORLD_LOCAL_SIZE"),
    Launcher("mpirun (MPICH)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    Launcher("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "", "FLUX_JOB_ID"),
)  # fmt: skip


def find_rank(environment: Mapping[str, str] | None = None) -> RankPlace | None:
    """Return the place that a launcher gave to this process; None for a process alone, and for a job of one.

    A launcher started by another one counts: torchrun under srun.  Raises ValueError where the place is incomplete.
    """
    variables = os.environ if environment is None else environment
    for launcher in LAUNCHERS:
        size = _size(launcher, variables)
        if size is None or _number(variables, launcher.rank) is None or _is_of_srun(launcher, variables):
            continue
        return None if size == 1 else _place(launcher, size, variables)
    found = several_processes(variables)
    if found is not None:
        launcher_name, variable, processes = found
        rank = next(each.rank for each in LAUNCHERS if each.name == launcher_name)
        raise ValueError(f"{variable}={processes}: without {rank}, the number of this process; set both, or neither")
    return None


def several_processes(environment: Mapping[str, str] | None = None) -> tuple[str, str, int] | None:
    """Return the launcher that started this command several times, its variable, and how often; None: it was not."""
    variables = os.environ if environment is None else environment
    srun, *others = sorted(LAUNCHERS, key=lambda launcher: launcher.name != "srun")
    if _number(variables, srun.rank) is not None and not is_script(variables):
        tasks = _size(srun, variables) or 1
        if tasks > 1:
            return srun.name, _size_variable(srun, variables), tasks
    for launcher in others:
        if (processes := _number(variables, launcher.size) or 1) > 1:
            return launcher.name, launcher.size, processes
    return None


def refuse_several_processes() -> None:
    """Raise ValueError if a launcher has started this command several times: each would train a run of its own."""
    found = several_processes()
    if found is None:
        return
    launcher, variable, processes = found
    remedy = {"torchrun": "torchrun --nproc-per-node 1, or without it", "srun": "srun --ntasks 1, or without srun"}
    raise ValueError(
        f"{variable}={processes}: {launcher} started this command {processes} times, and with distributed=none each "
        f"would train the same run again; let them train one run together: distributed=ddp (or fsdp, for a model that "
        f"is too large for one device); or start it once ({remedy.get(launcher, 'without ' + launcher.split()[0])}); "
        f"or, if these are different runs: env -u {variable} llmtrain …"
    )


def _is_of_srun(launcher: Launcher, variables: Mapping[str, str]) -> bool:
    """Return whether variables of ``launcher`` are none of its signs: of a SLURM script, of ``srun --mpi=pmi2``."""
    if launcher.name == "srun":
        return is_script(variables)
    return launcher.rank == "PMI_RANK" and "SLURM_PROCID" in variables and launcher.local_rank not in variables


def is_script(variables: Mapping[str, str]) -> bool:
    """Return whether this process is, or was started by, the script of a SLURM job, which runs once.

    Every command under ``srun`` runs as often as there are tasks.
    """
    return _number(variables, "SLURM_PROCID") == 0 and "SLURM_JOB_ID" in variables and "SLURM_STEP_ID" not in variables


def _place(launcher: Launcher, size: int, variables: Mapping[str, str]) -> RankPlace:
    rank = _number(variables, launcher.rank) or 0
    if rank >= size:
        raise ValueError(f"{launcher.rank}={rank}: with {_size_variable(launcher, variables)}={size} the ranks are "
                         f"0 to {size - 1}; both must come from the same launcher")  # fmt: skip
    local_rank, local_size = _local(launcher, size, variables)
    address, port = _meeting_point(launcher, local_size == size, variables)
    return RankPlace(launcher.name, rank, size, local_rank, local_size, address, port)


def _local(launcher: Launcher, size: int, variables: Mapping[str, str]) -> tuple[int, int]:
    """Find the number of this process on its machine, and how many there are."""
    local_rank = _number(variables, launcher.local_rank)
    if local_rank is None:
        local_rank = _number(variables, "LOCAL_RANK")
    local_size = _number(variables, launcher.local_size)
    if local_size is None and launcher.name == "srun":
        local_size = _slurm_tasks_here(variables)
    if local_size is None and launcher.name == "flux run" and variables.get("FLUX_JOB_NNODES") == "1":
        local_size = size
    if local_rank is None and launcher.name != "torchrun":
        raise ValueError(f"{launcher.name}: the environment does not name this process's number on its machine; set "
                         "LOCAL_RANK=0, 1, … for those of each machine")  # fmt: skip
    local_rank = local_rank or 0  # Kubernetes: one process a pod
    return local_rank, max(local_size or 1, local_rank + 1)


def _meeting_point(launcher: Launcher, one_machine: bool, variables: Mapping[str, str]) -> tuple[str, int]:
    """Find the address and the port at which rank 0 waits for the others; those of the user's come first."""
    address = variables.get("MASTER_ADDR", "").strip()
    if not address and launcher.name == "srun":
        nodes = next((variables[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
                      if variables.get(name)), "")  # fmt: skip
        address = first_host(nodes)
    if not address and one_machine:
        address = "127.0.0.1"
    if not address:
        raise ValueError(
            f"MASTER_ADDR: not set, and {launcher.name} does not name the machine of rank 0; export MASTER_ADDR=HOST "
            "MASTER_PORT=29500 to all ranks (Open MPI: mpirun -x MASTER_ADDR=HOST)"
        )
    named = variables.get("MASTER_PORT", "").strip()
    if named:
        if not named.isdecimal() or not 0 < int(named) < 65536:
            raise ValueError(f"MASTER_PORT={named}: must be the number of a port, 1 to 65535")
        return address, int(named)
    return address, _port(launcher, variables)


def _port(launcher: Launcher, variables: Mapping[str, str]) -> int:
    """Choose the port by the number of the job, and of its step: two jobs on one machine have two."""
    if launcher.name == "srun":
        step = _number(variables, "SLURM_STEP_ID") or 0
        job = _number(variables, "SLURM_JOB_ID")
        return PORT if job is None else LOWEST_PORT + (31 * job + step) % PORTS
    job_name = variables.get(launcher.job, "") if launcher.job else ""
    return LOWEST_PORT + zlib.crc32(job_name.encode()) % PORTS if job_name else PORT


def first_host(nodes: str) -> str:
    """Return the first name of a list as SLURM writes it: ``node[003-010,12],gpu5``, ``rack[1-2]n[1-4]``."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def _slurm_tasks_here(variables: Mapping[str, str]) -> int | None:
    """Read the number of tasks of this node from a list as SLURM writes it: ``4(x2),3``."""
    text = next((variables[name] for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
                 if variables.get(name)), "")  # fmt: skip
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return None
        counts += [int(found[1])] * min(int(found[2] or 1), 100_000)
    node = _number(variables, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else None


def _size(launcher: Launcher, variables: Mapping[str, str]) -> int | None:
    return _number(variables, _size_variable(launcher, variables))


def _size_variable(launcher: Launcher, variables: Mapping[str, str]) -> str:
    """Return the name of the variable with the number of processes: of a SLURM step, else of the job."""
    return "SLURM_NTASKS" if launcher.name == "srun" and launcher.size not in variables else launcher.size


def _number(variables: Mapping[str, str], name: str) -> int | None:
    value = variables.get(name, "")
    return int(value) if value.isdecimal() else None
