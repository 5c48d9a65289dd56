"""One command started as several ranks is refused; jobs of one task, and scripts of larger jobs, are not."""

import pytest

from llmtrain.base.ranks import several_processes
from tests.helpers.cli import TINY

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}


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


def test_training_as_several_ranks_is_refused(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain import Run
    from llmtrain.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", *TINY, "loop.max_steps=1"]) == 2
    assert "WORLD_SIZE=2: torchrun started this command 2 times" in capsys.readouterr().err
    assert main(["train", *TINY, "--cfg", "job"]) == 0
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        Run.compose(*TINY, "loop.max_steps=1").train()
    assert not list(tmp_path.iterdir())
