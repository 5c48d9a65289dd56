"""Bad text planted in a run's data: the run recovers with recovery=on, and not without."""

import json
import pydoc_data.topics
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.directory import find_checkpoints, step_of
from tests.helpers.cli import TINY, assert_same_end, cut_back, environment, llmtrain, rows
from tests.recovery.planted import MARKER

LENGTH, BATCH = 64, 8
STEP = LENGTH * BATCH  # characters that a step takes
TEXT = "".join(c for key in sorted(pydoc_data.topics.topics) for c in pydoc_data.topics.topics[key] if ord(c) < 128)
SETTINGS = (
    *TINY, f"data.sequence_length={LENGTH}", f"accumulation.batch_size={BATCH}",
    f"accumulation.micro_batch_size={BATCH}", "data=text", "data.path=text.txt", "data.shuffle=false",
    "data.validation_fraction=0.1", "plugins=[planted]", "objective._target_=planted.Poisonable",
)  # fmt: skip


def garbage(characters: int) -> str:
    chance = random.Random(0)
    return "".join(chr(chance.randrange(33, 127)) for _ in range(characters))


def planted(text: str, *, spike: range = range(0), nan: range = range(0)) -> str:
    """``text`` with garbage for the steps of ``spike``, and the marker in every sequence of those of ``nan``."""
    changed = list(text)
    changed[spike.start * STEP : spike.stop * STEP] = garbage(len(spike) * STEP)
    for sequence in range(nan.start * BATCH, nan.stop * BATCH):
        place = sequence * LENGTH + 20
        changed[place : place + len(MARKER)] = MARKER.decode()
    return "".join(changed)


def train(folder: Path, text: str, *overrides: str, check: int = 0) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    shutil.copy(Path(__file__).parent / "planted.py", folder)
    llmtrain("train", *SETTINGS, *overrides, "run_dir=run", cwd=folder, check=check)
    return folder / "run"


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(run) if row.get("event") == name]


@pytest.mark.slow
def test_a_run_with_recovery_ends_as_one_on_clean_text(tmp_path: Path) -> None:
    text = TEXT[: 320 * STEP]
    long = ("loop.max_steps=252", "loop.eval_every=252", "optimizer.lr=3e-3", "schedule.min_lr=1e-3",
            "checkpoint.every_steps=100")  # fmt: skip
    spike, nan = range(205, 245), range(100, 106)
    bad = planted(text, spike=spike, nan=nan)

    def final(run: Path) -> float:
        return json.loads((run / "summary.json").read_text())["final_val_loss"]

    clean = final(train(tmp_path / "clean", text, *long))
    recovered = train(tmp_path / "on", bad, *long, 'recovery="on"')
    assert abs(final(recovered) / clean - 1) < 0.04  # 0.7 to 1.8% with three seeds
    assert final(train(tmp_path / "off", planted(text, spike=spike), *long, "recovery=off")) / clean > 1.05  # 7 to 19%
    gave_up = train(tmp_path / "off-nan", bad, *long, "recovery=off", check=1)
    assert json.loads((gave_up / "summary.json").read_text())["exit_reason"] == "failed"

    refused = events(recovered, "refused")
    assert 4 <= len(refused) <= 30
    for row in refused:
        first = row["position"] // BATCH
        assert first in nan or first in spike
        for example in row["examples"]:
            excerpt = example["text"].strip("…")
            assert excerpt in bad
            if first in nan:
                assert "planted NaN" in excerpt
            else:
                assert excerpt in garbage(len(spike) * STEP)
        assert len(row["examples"]) == 3
    assert [row["batches"] for row in events(recovered, "skip")][:1] == [10]
    log = (tmp_path / "on" / "run" / "train.log").read_text()
    assert "planted NaN" in log


QUICK = (
    "recovery.window_steps=32", "recovery.min_window_steps=16", "recovery.rollback_steps=5",
    "recovery.rollback_skip_batches=5", "recovery.skip_batches=2", "optimizer.lr=3e-3", "schedule=constant",
    "checkpoint.every_steps=1", "checkpoint.keep_last=0", "model.dropout=0.1",
)  # fmt: skip


@pytest.mark.slow
def test_a_kill_during_recovery_changes_nothing(tmp_path: Path) -> None:
    """Resumed from the checkpoints before, between and after the refusals: the same decisions, the same bits."""
    run = train(tmp_path / "whole", planted(TEXT[: 100 * STEP], spike=range(50, 60)), *QUICK, "loop.max_steps=64")
    assert [row["step"] for row in events(run, "refused")][:3] == [51, 52, 53]
    skips = [row["step"] for row in events(run, "skip")]
    assert skips[0] == 54
    for step in (50, 51, 52, 53, 54, 55):
        copy = cut_back(run, step, tmp_path / "whole" / f"from-{step}")
        llmtrain("resume", copy.name, "plugins=[planted]", cwd=tmp_path / "whole")
        assert_same_end(run, copy)


@pytest.mark.slow
def test_a_rollback_continues_with_other_data_at_a_lower_rate(tmp_path: Path) -> None:
    """A rate that throws the model off: back to a checkpoint, on with other data, at last at a lower rate."""
    more = ("recovery.max_skips=1", "recovery.rollback_after=4", "recovery.lower_rate_at=1",
            "recovery.lower_rate_factor=0.001", "metrics=tensorboard")  # fmt: skip
    run = train(tmp_path / "run", TEXT[: 100 * STEP], *QUICK, *more, "loop.max_steps=40", "loop.eval_every=10")
    wild = ("optimizer.lr=1.0", "clipping=none", "loop.max_steps=60")
    done = llmtrain("resume", "run", *wild, "plugins=[planted]", cwd=tmp_path / "run")
    (back,) = events(run, "roll_back")
    first_refused = events(run, "refused")[0]["step"]
    assert back["to_step"] == first_refused - 5
    assert back["position"] > back["step"] * BATCH
    assert events(run, "lower_rate")[0]["factor"] == 0.001
    assert "roll back" in done.stdout
    steps = [row["step"] for row in rows(run) if "loss" in row and "event" not in row]
    assert steps == list(range(1, 61))  # each once, though some were taken twice
    assert [step_of(path) for path in find_checkpoints(run)][-1] == 60
    state = json.loads((run / "checkpoints" / "step-00000060" / "state.json").read_text())
    assert state["skipped_sequences"] == 7 * BATCH
    assert state["position"] == back["position"] + (60 - back["to_step"]) * BATCH
    path = {"PYTHONPATH": str(tmp_path / "run")}
    assert "bit for bit" in llmtrain(
        "verify", "run", "plugins=[planted]", cwd=tmp_path / "run", env=environment(**path)
    ).stdout  # fmt: skip
