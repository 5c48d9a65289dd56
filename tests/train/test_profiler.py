"""A profile of a few steps."""

import errno
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmtrain import Run
from llmtrain.config import stored_config
from llmtrain.run.directory import RunDirectory
from llmtrain.train.profiler import WIDTH
from tests.helpers.cli import TINY, cut_back, llmtrain, rows

PNG = b"\x89PNG\r\n\x1a\n"
FILES = {"trace.json.gz", "operations.txt", "memory.png"}


def train(folder: Path, *overrides: str) -> Path:
    steps = () if any(override.startswith("loop.max_steps") for override in overrides) else ("loop.max_steps=9",)
    return (
        Run.compose(*TINY, "accumulation.micro_batch_size=2", *steps, *overrides, f"run_dir={folder}").train().run_dir
    )


def numbers(run_dir: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in rows(run_dir) if "loss" in row and "event" not in row]


@pytest.mark.slow
def test_the_profile_is_written_and_changes_no_number(tmp_path: Path) -> None:
    plain, profiled = train(tmp_path / "plain"), train(tmp_path / "profiled", "runtime.profile=true")
    assert not (plain / "profile").exists()
    assert numbers(plain) == numbers(profiled)
    states = [load_file(run / "checkpoints" / "step-00000009" / "model.safetensors") for run in (plain, profiled)]
    assert all(np.array_equal(states[0][name].numpy(), states[1][name].numpy()) for name in states[0])

    folder = profiled / "profile" / "step-00000005"
    assert {path.name for path in folder.iterdir()} == FILES
    assert not list(profiled.glob(".tmp-*"))
    (event,) = (row for row in rows(profiled) if row.get("event") == "profile")
    assert event["step"] == 7
    assert event["path"] == "profile/step-00000005"
    log = (profiled / "train.log").read_text()
    assert f"steps 5 to 7: {folder}/trace.json.gz" in log
    assert f"profile          {folder}" in log  # of the summary
    assert json.loads((profiled / "summary.json").read_text())["profile"] == str(folder)

    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    phases = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "llmtrain"]
    micro_batches = ["forward", "backward"] * 2
    one_step = ["data", *micro_batches, "optimizer", "other", "optimizer"]
    assert phases == [*one_step, "other", *one_step, "other", *one_step]  # between the steps: other

    lines = (folder / "operations.txt").read_text().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith("profiled, steps 5 to 7")
    mm = [line.split() for line in lines if " aten::mm " in line]
    shares = [float(line.split()[1].rstrip("%")) for line in lines[4:] if "%" in line]
    assert shares == sorted(shares, reverse=True)
    assert any(words[3] == "4.0" for words in mm)  # 2 blocks, 2 micro-batches: so many a step
    assert (folder / "memory.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_a_resumed_run_profiles_its_own_first_steps(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "runtime.profile=true", "loop.max_steps=16", "checkpoint.every_steps=8",
                  "checkpoint.keep_last=0")  # fmt: skip
    copy = cut_back(whole, 8, tmp_path / "copy")
    Run.from_config(stored_config.load(copy / "config.yaml")).resume(RunDirectory.open(copy))
    assert numbers(copy) == numbers(whole)
    assert sorted(path.name for path in (copy / "profile").iterdir()) == ["step-00000005", "step-00000013"]
    assert [row["step"] for row in rows(copy) if row.get("event") == "profile"] == [7, 15]


@pytest.mark.parametrize(("steps", "message"), [(6, "steps 5 to 6: "), (3, "none written: steps 5 to 7 are")])
def test_a_short_run_profiles_the_steps_it_has(tmp_path: Path, steps: int, message: str) -> None:
    done = llmtrain("train", *TINY, f"loop.max_steps={steps}", "runtime.profile=true", "run_dir=run", cwd=tmp_path)
    assert message in done.stdout
    assert (tmp_path / "run" / "profile").exists() == (steps == 6)
    assert ("runtime.profile=true: has no effect: the run ends after 3 steps" in done.stdout) == (steps == 3)
    assert "USDT" not in done.stderr


@pytest.mark.slow
def test_verify_writes_no_profile(tmp_path: Path) -> None:
    train(tmp_path / "run", "runtime.profile=true", "checkpoint.every_steps=1", "checkpoint.keep_last=0")
    before = sorted((tmp_path / "run").rglob("*"))
    done = llmtrain("verify", "run", "replay_steps=7", cwd=tmp_path)
    assert "profile" not in done.stdout
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    """A file stands where the folder of these steps should be."""
    folder = tmp_path / "run"
    run = Run.compose(*TINY, "loop.max_steps=9", "runtime.profile=true", f"run_dir={folder}")
    directory = run.create_directory()
    run.describe(directory, torch.device("cpu"), [])
    (folder / "profile").mkdir()
    (folder / "profile" / "step-00000005").write_text("in the way")
    result = run.resume(RunDirectory.open(folder))
    assert result.summary["step"] == 9
    assert result.summary["profile"] is None
    (event,) = (row for row in rows(folder) if row.get("event") == "profile")
    assert event["path"] is None
    assert os.strerror(errno.ENOTDIR) in event["message"]
    assert not list(folder.glob(".tmp-profile*"))
