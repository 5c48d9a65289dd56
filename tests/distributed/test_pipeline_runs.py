"""Pipelines through the command line, beside one process: training, evaluation, checkpoints, failures."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.distributed.whole_runs import (
    SECONDS,
    assert_same_training,
    assert_same_validations,
    llmtrain,
    process_of_rank,
    rows,
    start,
    wait_for_step,
    write_text,
)

RUN = (
    "model=tiny", "model.dropout=0", "model.num_layers=4", "model.hidden_size=32", "tokenizer=byte", "data=text",
    "data.path=text.txt", "data.sequence_length=32", "accumulation.batch_size=6", "accumulation.micro_batch_size=2",
    "loop.max_steps=12", "loop.eval_every=6", "loop.eval_batches=3", "loop.sample_every=6", "loop.sample_tokens=2",
    "checkpoint.every_steps=6", "metrics.log_every=1", "precision=fp32", "schedule=constant", "schedule.warmup_steps=0",
    "runtime.num_threads=1",
)  # fmt: skip
PIPELINE = ("distributed=pipeline", "distributed.processes=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and the run ``one`` of one process."""
    path = tmp_path_factory.mktemp("pipeline")
    write_text(path)
    llmtrain(path, "train", "run_dir=one", *RUN)
    return path


def test_a_run_in_a_pipeline_goes_on_by_one_process(folder: Path) -> None:
    llmtrain(folder, "train", "run_dir=both", *RUN, *PIPELINE, "loop.max_steps=6")
    parts = sorted(path.name for path in (folder / "both" / "checkpoints" / "step-00000006").glob("model*"))
    assert parts == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    texts = [[json.loads(line)["text"] for line in (folder / run / "samples.jsonl").read_text().splitlines()]
             for run in ("both", "one")]  # fmt: skip
    assert texts[0] == texts[1][:1]
    llmtrain(folder, "resume", "both", "loop.max_steps=12", "distributed=none", "distributed.processes=1")
    assert_same_training(folder, "both")
    assert_same_validations(folder, "both")


def test_too_few_micro_batches_are_refused_before_anything_starts(folder: Path) -> None:
    done = llmtrain(folder, "train", "run_dir=no", *RUN, *PIPELINE, "accumulation.micro_batch_size=6", check=2)
    assert "accumulation.micro_batch_size=3 or less" in done.stderr
    assert not (folder / "no").exists()


def test_a_process_without_anything_to_train_is_refused(folder: Path) -> None:
    frozen = ("objective=classification", "data=labelled", "data.path=labels.jsonl", "objective.train=head")
    rows = [{"text": f"Text {number}", "label": "ab"[number % 2]} for number in range(64)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    without = [word for word in RUN if not word.startswith(("data", "loop.sample"))]
    words = ("train", "run_dir=idle", *without, *frozen, "loop.sample_every=0", *PIPELINE)
    done = llmtrain(folder, *words, check=2)
    assert "the first process would hold frozen weights alone" in done.stderr
    assert not (folder / "idle").exists()


@pytest.mark.slow
def test_a_run_goes_on_in_other_divisions(folder: Path) -> None:
    interleaved = (*PIPELINE, "distributed.pipeline_schedule=interleaved", "distributed.stages_per_process=2")
    four = ("distributed=pipeline", "distributed.processes=4", "distributed.shard=2")
    stages = [PIPELINE, ("distributed=fsdp", "distributed.processes=2"), interleaved, four]
    for number, mesh in enumerate(stages, 1):
        words = ("train", "run_dir=elastic", *RUN) if number == 1 else ("resume", "elastic")
        llmtrain(folder, *words, f"loop.max_steps={3 * number}", *mesh)
    assert_same_training(folder, "elastic")
    llmtrain(folder, "verify", "elastic")


@pytest.mark.slow
def test_a_killed_stage_is_named_and_a_restart_finishes_the_run_bit_for_bit(folder: Path) -> None:
    words = (*RUN, *PIPELINE, "model.dropout=0.1", "checkpoint.every_steps=2", "loop.max_steps=30", "loop.eval_every=0")
    process = start(folder, "train", "run_dir=killed", *words, "distributed.restarts=1")
    wait_for_step(folder / "killed", 5, process)
    os.kill(process_of_rank(folder / "killed", 1), signal.SIGKILL)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output + errors
    assert "rank 1" in errors
    assert "SIGKILL" in errors
    llmtrain(folder, "train", "run_dir=undisturbed", *words)
    one, other = rows(folder / "undisturbed"), rows(folder / "killed")
    assert sorted(other) == list(range(1, 31))
    for key in ("loss", "grad_norm"):
        assert [other[step][key] for step in other] == [one[step][key] for step in one], key
