"""The length of training: one count for the loop, a resume, the plan, the linter and the header."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llmtrain.accumulation import Accumulation
from llmtrain.accumulation.auto import AutoBatch
from llmtrain.accumulation.fixed import FixedBatch
from llmtrain.accumulation.ramp import RampedBatch, Stage, Unit
from llmtrain.cli.main import main
from llmtrain.config import stored_config
from llmtrain.data.examples import Examples, ExampleStore
from llmtrain.data.sequences import Sequences, Stream
from llmtrain.run.run import Run
from llmtrain.train.length import BatchSizes, Place, TrainingLength
from tests.helpers.cli import TINY, rows

TEN = [Stage(0, 2), Stage(10, 4), Stage(25, 7)]
LATE = [Stage(0, 8), Stage(200, 4), Stage(201, 6), Stage(240, 2), Stage(900, 16)]
OPTIONS = [
    FixedBatch(6, 2), AutoBatch(6), RampedBatch(TEN, Unit.steps, 2), RampedBatch(TEN, Unit.tokens, 2),
    RampedBatch(LATE, Unit.tokens, 2),
]  # fmt: skip


class StepByStep(Accumulation):
    """Another option's batch sizes by the contract alone, which says nothing of where they change."""

    def __init__(self, option: Accumulation) -> None:
        self.option = option

    def batch_size_at(self, step: int, tokens: int) -> int:
        return self.option.batch_size_at(step, tokens)


def examples(number: int, seed: int = 3) -> Examples:
    """Examples of 1 to 40 tokens, without any ids."""
    lengths = np.random.default_rng(seed).integers(1, 41, number)
    return Examples(ExampleStore([], lengths, np.zeros(number, np.int64), has_targets=False), 64)


def walked(option: Accumulation, data: Sequences, steps: int) -> Iterator[Place]:
    """The places of a run, by looking up the length of every sequence, as the loader does."""
    lengths = getattr(data, "lengths", np.full(len(data), data.sequence_length))
    place = Place()
    for step in range(steps + 1):
        yield place
        size = option.batch_size_at(step, place.tokens)
        numbers = data.order(np.arange(place.position, place.position + size), 5, True)
        place = Place(step + 1, place.position + size, place.tokens + int(lengths[numbers].sum()))


@pytest.mark.parametrize("data", [examples(37), examples(2100), Stream([np.arange(321)], 8)])
@pytest.mark.parametrize("option", OPTIONS)
def test_counted_places_are_those_of_the_loader(option: Accumulation, data: Sequences) -> None:
    for counted in (option, StepByStep(option)):
        length = TrainingLength(BatchSizes(counted, data, 5, True), 40)
        places = [*walked(option, data, 40)]
        assert [length.place_after(step) for step in range(41)] == places
        assert length.place_from(places[17]) == length.end == places[40]
        sizes = [later.position - one.position for one, later in pairwise(places)]
        assert length.largest_batch == max(sizes)
        assert [length.batch_size_at(place.step, place.tokens) for place in places[:40]] == sizes


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_ends_at_the_first_step_that_reaches_its_tokens_or_sequences(option: Accumulation) -> None:
    data = examples(53)
    places = [*walked(option, data, 80)]
    for goal in (1, 40, 90, 160):
        *_, last = BatchSizes(option, data, 5, True).stretches(Place(), max_tokens=goal)
        steps = last.begin.step + last.steps
        assert places[steps - 1].tokens < goal <= places[steps].tokens
        *_, last = BatchSizes(option, data, 5, True).stretches(Place(), max_position=goal)
        steps = last.begin.step + last.steps
        assert places[steps - 1].position < goal <= places[steps].position


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("epochs", "sequences"), [(1, 53), (2.0, 106), (0.5, 27), (1.1, 59)])
def test_epochs_end_with_a_smaller_step_or_with_a_whole_one(
    option: Accumulation, epochs: float, sequences: int
) -> None:
    run = Run.compose(*TINY, "loop.max_steps=null", f"loop.epochs={epochs}")
    assert run.loop.end_position(53) == sequences
    object.__setattr__(run, "accumulation", option)
    exact = run.length(examples(53))
    assert exact.sequences == sequences
    object.__setattr__(run.loop, "whole_batches", True)
    whole = run.length(examples(53))
    assert whole.max_steps == exact.max_steps
    assert sequences <= whole.sequences < sequences + whole.batch_size_at(whole.max_steps - 1, whole.tokens)


def test_epochs_and_max_steps_whichever_ends_first() -> None:
    epochs = ("loop.epochs=2", "accumulation.batch_size=4")
    assert Run.compose(*TINY, *epochs, "loop.max_steps=null").length(examples(10)).max_steps == 5
    assert Run.compose(*TINY, *epochs, "loop.max_steps=null").length(examples(11)).max_steps == 6
    both = Run.compose(*TINY, *epochs, "loop.max_steps=3").length(examples(11))
    assert (both.max_steps, both.missing) == (3, 0)


def test_one_smaller_step_is_its_own_largest() -> None:
    run = Run.compose(*TINY, "loop.epochs=1", "loop.max_steps=null", "accumulation.batch_size=8")
    assert run.length(examples(3)).largest_batch == 3
    assert run.length(examples(11)).largest_batch == 8


def labelled(folder: Path, number: int = 50) -> tuple[str, ...]:
    """A file of short texts with labels, and the overrides that train on it."""
    path = folder / "texts.jsonl"
    texts = [{"text": "so " * (1 + at % 7) + str(at), "label": "ab"[at % 2]} for at in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return (
        *TINY[:4], "loop.eval_every=0", "loop.sample_every=0", "data=labelled", f"data.path={path}",
        "data.validation_fraction=0", "data.sequence_length=64", "objective=classification", "objective.train=all",
        "precision=fp32", "metrics.log_every=1", f"output_dir={folder}", "loop.max_steps=null",
    )  # fmt: skip


RAMP = (
    "accumulation=ramp", "accumulation.unit=tokens", "accumulation.micro_batch_size=4",
    "accumulation.stages=[{start: 0, batch_size: 2}, {start: 100, batch_size: 4}, {start: 600, batch_size: 8}]",
)  # fmt: skip


def test_a_ramp_over_short_texts_trains_the_epochs_that_it_was_given(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The starts are in tokens trained on, of which short texts have fewer than the sequence length."""
    assert main(["train", *labelled(tmp_path), *RAMP, "loop.epochs=2", f"run_dir={tmp_path / 'run'}"]) == 0
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert sum(row["batch_size"] for row in found) == 100
    assert found[-1]["epoch"] == 2.0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == summary["max_steps"] == len(found)
    header = capfd.readouterr().out
    tokens = found[-1]["tokens"]
    assert tokens < 100 * 64 / 2
    assert f"{len(found)} steps, {tokens / 1000:.2f}k tokens, 2.00 epochs" in header
    figures = tmp_path / "plan.json"
    options = [key for key in (*labelled(tmp_path), *RAMP) if not key.startswith("output_dir")]
    assert main(["plan", *options, "loop.epochs=2", "probe=false", f"json={figures}"]) == 0
    planned = json.loads(figures.read_text())
    assert (planned["steps"], planned["tokens"]) == (len(found), tokens)


def test_a_run_that_ended_with_a_smaller_step_goes_on_to_a_whole_number_of_passes(tmp_path: Path) -> None:
    batch = ("accumulation.batch_size=8", "accumulation.micro_batch_size=8")
    assert main(["train", *labelled(tmp_path, 11), *batch, "loop.epochs=1", f"run_dir={tmp_path / 'run'}"]) == 0
    assert [row["batch_size"] for row in rows(tmp_path / "run") if "loss" in row] == [8, 3]
    assert main(["resume", str(tmp_path / "run"), "loop.epochs=3"]) == 0
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["batch_size"] for row in found] == [8, 3, 8, 8, 6]
    assert [row["epoch"] for row in found][1::3] == [1.0, 3.0]
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_a_run_of_a_version_without_the_key_ends_with_a_whole_step(tmp_path: Path) -> None:
    batch = ("accumulation.batch_size=8", "accumulation.micro_batch_size=8", "loop.epochs=1")
    config = stored_config.dump(Run.compose(*labelled(tmp_path, 11), *batch))
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.yaml").write_text(config.replace("  whole_batches: false\n", ""))
    assert main(["resume", str(tmp_path / "older")]) == 0
    assert [row["batch_size"] for row in rows(tmp_path / "older") if "loss" in row] == [8, 8]
