"""Launchers that start one command several times, as the ranks of one job: not supported yet."""

import os
from collections.abc import Mapping

# By launcher: the variable that holds the number of processes.
COUNTS = {
    "torchrun": "WORLD_SIZE",  # accelerate, deepspeed and the PyTorch operators of Kubernetes set it, too
    "mpirun (Open MPI)": "OMPI_COMM_WORLD_SIZE",
    "mpirun (MPICH)": "PMI_SIZE",
    "mpirun (MVAPICH)": "MV2_COMM_WORLD_SIZE",
    "flux run": "FLUX_JOB_SIZE",
}


def several_processes(environment: Mapping[str, str] | None = None) -> tuple[str, str, int] | None:
    """Return the launcher that started this command several times, its variable, and how often; None: it was not.

    A SLURM job of several tasks starts its script once, and every command under ``srun`` as often as there are tasks.
    """
    variables = os.environ if environment is None else environment
    if _number(variables, "SLURM_PROCID") is not None:
        step = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
        is_first = int(variables["SLURM_PROCID"]) == 0
        is_script = is_first and "SLURM_JOB_ID" in variables and "SLURM_STEP_ID" not in variables
        tasks = _number(variables, step) or 1
        if tasks > 1 and not is_script:
            return "srun", step, tasks
    for launcher, count in COUNTS.items():
        if (processes := _number(variables, count) or 1) > 1:
            return launcher, count, processes
    return None


def refuse_several_processes() -> None:
    """Raise ValueError if a launcher has started this command several times: each would train a run of its own."""
    found = several_processes()
    if found is None:
        return
    launcher, variable, processes = found
    remedy = {"torchrun": "torchrun --nproc-per-node 1, or without it", "srun": "srun --ntasks 1, or without srun"}
    raise ValueError(
        f"{variable}={processes}: {launcher} started this command {processes} times, and training with several "
        f"processes is not supported: each would train the same run again; start it once ("
        f"{remedy.get(launcher, 'without ' + launcher.split()[0])}), or, if these are different runs: "
        f"env -u {variable} llmtrain …"
    )


def _number(variables: Mapping[str, str], name: str) -> int | None:
    value = variables.get(name, "")
    return int(value) if value.isdecimal() else None
