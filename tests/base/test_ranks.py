"""One command started as several ranks is recognised; jobs of one task, and scripts of larger jobs, are no ranks."""

import subprocess
import sys

import pytest

from llmtrain.base.ranks import RankPlace, find_rank, first_host, several_processes
from tests.helpers.cli import TINY

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
STEP = {
    "SLURM_JOB_ID": "70010", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_JOB_NODELIST": "node[001-009]",
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29400",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
ALONE = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}  # on its machine
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FLUX = {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "1"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "torchrun"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "", "RANK": ""}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun (Open MPI)"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpirun (MPICH)"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "mpirun (MVAPICH)"),
        ({"FLUX_JOB_SIZE": "2"}, "flux run"),
        (BATCH, None),  # the script of sbatch --ntasks=2 is started once
        ({**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "srun"),
        ({**BATCH, "SLURM_PROCID": "1"}, "srun"),
        ({**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --ntasks=1 in a job of two
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # a shell of salloc --ntasks=2
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun"),
    ],
)
def test_several_processes_of_one_command_are_recognised(environment: dict[str, str], launcher: str | None) -> None:
    found = several_processes(environment)
    assert (None if found is None else found[0]) == launcher


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (BATCH, None),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
        (TORCHRUN, RankPlace("torchrun", 3, 8, 3, 4, "host-a", 29400)),
        # a pod of Kubernetes' PyTorch operator
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"},
         RankPlace("torchrun", 1, 2, 0, 1, "job-0", 23456)),
        (STEP, RankPlace("srun", 5, 7, 1, 3, "node003", 20312)),
        (STEP | {"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
         RankPlace("srun", 2, 7, 2, 4, "node003", 20312)),
        (STEP | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4000"}, RankPlace("srun", 5, 7, 1, 3, "10.0.0.9", 4000)),
        (STEP | {"PMI_RANK": "5", "PMI_SIZE": "7"}, RankPlace("srun", 5, 7, 1, 3, "node003", 20312)),  # --mpi=pmi2
        (STEP | TORCHRUN, RankPlace("torchrun", 3, 8, 3, 4, "host-a", 29400)),  # torchrun under srun
        (STEP | {"WORLD_SIZE": "7"}, RankPlace("srun", 5, 7, 1, 3, "node003", 20312)),  # exported by the job's script
        (ALONE, RankPlace("mpirun (Open MPI)", 3, 4, 3, 4, "127.0.0.1", 29500)),
        (OPEN_MPI | {"MASTER_ADDR": "a"}, RankPlace("mpirun (Open MPI)", 3, 4, 1, 2, "a", 29500)),
        # its helper on another node was started by srun
        (STEP | OPEN_MPI | {"MASTER_ADDR": "a"}, RankPlace("mpirun (Open MPI)", 3, 4, 1, 2, "a", 29500)),
        (BATCH | ALONE, RankPlace("mpirun (Open MPI)", 3, 4, 3, 4, "127.0.0.1", 29500)),
        (MPICH, RankPlace("mpirun (MPICH)", 1, 2, 1, 2, "127.0.0.1", 29500)),
        (STEP | MPICH, RankPlace("mpirun (MPICH)", 1, 2, 1, 2, "127.0.0.1", 29500)),
        (FLUX, RankPlace("flux run", 1, 2, 1, 2, "127.0.0.1", 29500)),
    ],
)  # fmt: skip
def test_launchers_tell_each_rank_its_place(environment: dict[str, str], place: RankPlace | None) -> None:
    assert find_rank(environment) == place


def test_jobs_of_one_machine_meet_at_their_own_ports() -> None:
    ports = set()
    for job in ("prterun-host-1234@1", "prterun-host-1235@1", "prterun-host-1235@2"):
        found = find_rank(ALONE | {"PMIX_NAMESPACE": job})
        assert found is not None
        ports.add(found.port)
    for job, step in (("70010", "0"), ("70010", "1"), ("70011", "0")):
        found = find_rank(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        assert found is not None
        ports.add(found.port)
    assert len(ports) == 6
    assert all(10_000 <= port < 30_000 for port in ports)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4: without RANK"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8: with WORLD_SIZE=8 the ranks are 0 to 7"),
        (TORCHRUN | {"MASTER_PORT": "abc"}, "MASTER_PORT=abc: must be the number of a port"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR: not set"),
        (OPEN_MPI, "mpirun -x MASTER_ADDR=HOST"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "set LOCAL_RANK=0, 1"),
    ],
)
def test_an_incomplete_place_is_an_error(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_rank(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[003-010,12],other5", "node003"),
        ("gpu7,node[1-2]", "gpu7"),
        ("rack[1-2]n[04,7]", "rack1n04"),
        ("a-b[2,5-9].cluster,x", "a-b2.cluster"),
        ("", ""),
    ],
)
def test_lists_of_nodes_are_expanded(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ranks_are_found_without_importing_torch() -> None:
    code = "import sys, llmtrain.base.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_training_as_several_ranks_is_refused(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain import Run
    from llmtrain.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", *TINY, "loop.max_steps=1"]) == 2
    errors = capsys.readouterr().err
    assert "WORLD_SIZE=2: torchrun started this command 2 times" in errors
    assert "distributed=ddp" in errors
    assert main(["train", *TINY, "--cfg", "job"]) == 0
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        Run.compose(*TINY, "loop.max_steps=1").train()
    assert not list(tmp_path.iterdir())
