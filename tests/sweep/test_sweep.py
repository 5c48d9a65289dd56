"""Sweeps: all jobs checked first, each in its own process, ranked at the end, continued by the same command."""

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.config.compose import compose
from llmtrain.sweep.jobs import Job
from tests.helpers.cli import TINY, llmtrain, rows

SWEEP = ("train", "-m", *TINY, "loop.max_steps=6", "loop.eval_every=3", "checkpoint.every_steps=2")


def runs(folder: Path) -> list[Path]:
    """The jobs of the one sweep below ``folder``."""
    return sorted(path.parent for path in folder.glob("runs/sweeps/*/*/config.yaml"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished sweep of three jobs, to be copied, and what it wrote."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, llmtrain(*SWEEP, "optimizer.lr=1e-4,1e-3,1e-2", "runtime.seed=1", cwd=folder).stdout


@pytest.fixture
def folder(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the folder of the finished sweep."""
    return Path(shutil.copytree(finished[0], tmp_path / "sweep"))


@pytest.mark.slow
def test_a_sweep_ranks_its_runs_and_skips_what_is_done(finished: tuple[Path, str], folder: Path) -> None:
    jobs = runs(folder)
    assert len(jobs) == 3
    assert all(job.name.startswith("optimizer.lr_") for job in jobs)
    losses = {json.loads((job / "summary.json").read_text())["best_val_loss"]: job.name for job in jobs}
    table = finished[1][finished[1].rindex("──") :]
    places = [table.index(f"{loss:.4f}") for loss in sorted(losses)]
    assert places == sorted(places), table
    before = {job: (job / "metrics.jsonl").read_bytes() for job in jobs}
    again = llmtrain(*SWEEP, "optimizer.lr=1e-4,1e-3,1e-2", "runtime.seed=1", cwd=folder)
    assert again.stdout.count("finished already") == 3
    assert {job: (job / "metrics.jsonl").read_bytes() for job in jobs} == before
    sweep = jobs[0].parent
    report = llmtrain("report", str(sweep), cwd=folder)
    assert "optimizer.lr" in report.stdout
    assert (sweep / "report.png").read_bytes().startswith(b"\x89PNG")


def test_another_order_of_overrides_is_the_same_sweep(folder: Path) -> None:
    again = llmtrain("train", "runtime.seed=1", *SWEEP[1:], "optimizer.lr=1e-4,1e-3,1e-2", cwd=folder)
    assert again.stdout.count("finished already") == 3


def of_an_older_version(job: Path, *, without: str) -> Path:
    """The job as a version without the key ``without`` has left it: its digest was another."""
    config = (job / "config.yaml").read_text()
    assert f"  {without}: " in config
    (job / "config.yaml").write_text("".join(
        line for line in config.splitlines(keepends=True) if not line.startswith(f"  {without}: ")
    ))  # fmt: skip
    return job.rename(job.with_name(f"{job.name.rpartition('-')[0]}-0123abcd"))


def test_a_sweep_of_an_older_version_goes_on(folder: Path) -> None:
    """A key that has come since does not make its jobs others, unless the command sets it."""
    older = [of_an_older_version(job, without="whole_batches") for job in runs(folder)]
    again = llmtrain(*SWEEP, "optimizer.lr=1e-4,1e-3,1e-2", "runtime.seed=1", cwd=folder)
    assert again.stdout.count("finished already") == 3
    assert runs(folder) == sorted(older)


def test_a_job_is_found_by_its_digest_or_its_config(folder: Path) -> None:
    jobs = [
        Job.check(compose("train", overrides), overrides)
        for overrides in (
            [*SWEEP[2:], "runtime.seed=1", "optimizer.lr=1e-3"],
            [*SWEEP[2:], "runtime.seed=1", "optimizer.lr=1e-3", "loop.whole_batches=true"],
            [*SWEEP[2:], "runtime.seed=2", "optimizer.lr=1e-3"],
        )
    ]
    (begun,) = (job for job in runs(folder) if job.name.startswith("optimizer.lr_0.001-"))
    found = [job.directory(begun.parent, ["optimizer.lr=0.001"]).path for job in jobs]
    assert [path == begun for path in found] == [True, False, False]
    begun = of_an_older_version(begun, without="whole_batches")
    found = [job.directory(begun.parent, ["optimizer.lr=0.001"]).path for job in jobs]
    assert [path == begun for path in found] == [True, False, False]
    (begun / "config.yaml").write_text("- no config")
    assert jobs[0].directory(begun.parent, ["optimizer.lr=0.001"]).path != begun


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep of two jobs, the second of which fails, in a directory of its own, and what it wrote."""
    folder = tmp_path_factory.mktemp("failed")
    diverging = ("optimizer.lr=1e-3,1e30", "schedule=constant", "clipping=none", "precision=fp32")
    return folder, llmtrain(*SWEEP, *diverging, "hydra.sweep.dir=my/sweep", cwd=folder, check=1).stdout


@pytest.mark.slow
def test_a_failing_job_does_not_lose_the_others(failed: tuple[Path, str]) -> None:
    summaries = failed[0].rglob("summary.json")
    states = [json.loads(summary.read_text())["exit_reason"] for summary in summaries]
    assert sorted(states) == ["failed", "finished"]
    assert "failed" in failed[1]


@pytest.mark.slow
def test_a_job_that_fails_before_training_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text(" \n")
    data = ("data=text", "data.path=bad.txt", "data.cache_dir=cache")
    done = llmtrain(*SWEEP, "optimizer.lr=1e-3", *data, cwd=tmp_path, check=1)
    assert "pending" not in done.stdout
    assert [json.loads((job / "summary.json").read_text())["exit_reason"] for job in runs(tmp_path)] == ["failed"]
    (tmp_path / "bad.txt").write_text((Path(__file__).parents[2] / "data" / "lighthouse.txt").read_text())
    llmtrain(*SWEEP, "optimizer.lr=1e-3", *data, cwd=tmp_path)
    assert [json.loads((job / "summary.json").read_text())["exit_reason"] for job in runs(tmp_path)] == ["finished"]


def test_all_jobs_are_checked_before_the_first_starts(tmp_path: Path) -> None:
    done = llmtrain(*SWEEP, "model.num_heads=2,3", cwd=tmp_path, check=2)
    assert "must be divisible by num_heads=3" in done.stderr
    assert "model.num_heads=3" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.rglob("multirun.yaml"))


@pytest.mark.slow
def test_an_interrupted_job_is_resumed(folder: Path) -> None:
    job = runs(folder)[0]
    whole = [row["loss"] for row in rows(job) if "loss" in row]
    (job / "summary.json").unlink()  # as a kill between the checkpoints of steps 4 and 6 would have left it
    shutil.rmtree(job / "checkpoints" / "step-00000006")
    again = llmtrain(*SWEEP, "optimizer.lr=1e-4,1e-3,1e-2", "runtime.seed=1", cwd=folder)
    assert again.stdout.count("finished already") == 2
    assert [row["loss"] for row in rows(job) if "loss" in row] == whole
    assert any(row.get("event") == "resume" and row["step"] == 4 for row in rows(job))


@pytest.mark.slow
def test_the_sweeps_directory_can_be_named(failed: tuple[Path, str]) -> None:
    assert len(list((failed[0] / "my" / "sweep").glob("*/summary.json"))) == 2
    assert not (failed[0] / "runs").exists()
