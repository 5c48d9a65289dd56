"""Reading runs, ranking them, drawing them: from the files alone."""

import contextlib
import fcntl
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from llmtrain.base.invocation import Invocation
from llmtrain.commands.report import Report, main
from llmtrain.metrics.local import Local
from llmtrain.report.curves import _draw_panel, _labels, _smooth, _unit, draw_comparison, draw_run
from llmtrain.report.runs import by_validation_data, differences, find_runs, ranked, summarise
from llmtrain.report.table import Comparison, comparisons, sweep_table

pytestmark = pytest.mark.usefixtures("drawn_plots")


def make_run(
    path: Path,
    *,
    lr: float = 1e-3,
    losses: tuple[float, ...] = (4.0, 3.0),
    val_losses: tuple[float, ...] = (),
    exit_reason: str | None = "finished",
    **config: Any,
) -> Path:
    path.mkdir(parents=True)
    values = {
        "name": "tiny",
        "run_dir": str(path),
        "optimizer": {"_target_": "llmtrain.optimizer.adamw.AdamW", "lr": lr},
    }
    values |= {"loop": {"max_steps": 100, "epochs": None}} | config
    (path / "config.yaml").write_text(yaml.safe_dump(values))
    with Local(log_every=1).build(path, resume_step=None) as metrics:
        for step, loss in enumerate(losses, start=1):
            metrics.row(
                {"step": step, "tokens": 64 * step, "loss": loss, "learning_rate": lr, "tokens_per_second": 32.0}
            )
        for index, val_loss in enumerate(val_losses):
            metrics.row({"step": index + 1, "tokens": 64 * (index + 1), "val_loss": val_loss})
    if exit_reason is not None:
        summary = {"exit_reason": exit_reason, "name": "tiny", "step": len(losses), "max_steps": len(losses)}
        summary |= {"tokens": 64 * len(losses), "train_seconds": 8.0, "tokens_per_second": 16.0}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def show(table: Any, width: int = 300) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def size_of(picture: Path) -> tuple[int, int]:
    height, width, _ = imread(picture).shape
    return width, height


# --- finding -----------------------------------------------------------------------------------------------------


def test_jobs_of_sweeps_are_found(tmp_path: Path) -> None:
    """runs/<date>/<run> and runs/sweeps/<sweep>/<job>."""
    runs = [make_run(tmp_path / "runs" / name) for name in ("2026-11-21/a", "sweeps/lr-1234/job-1")]
    make_run(tmp_path / "runs" / "sweeps" / "lr-1234" / "too" / "deep")
    assert find_runs([tmp_path / "runs"]) == runs


def test_runs_are_found_below_and_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs" / day / name) for day, name in (("d1", "a"), ("d1", "b"), ("d2", "c"))]
    (runs[0] / "checkpoints" / "step-1").mkdir(parents=True)
    (runs[0] / "checkpoints" / "step-1" / "config.yaml").write_text("name: tiny")
    (tmp_path / "runs" / "d2" / ".hydra").mkdir()
    (tmp_path / "runs" / "d2" / ".hydra" / "config.yaml").write_text("name: foreign")
    assert find_runs([tmp_path / "runs"]) == runs
    assert find_runs([tmp_path / "runs" / "d1", runs[0]]) == runs[:2]
    assert find_runs([runs[2]]) == [runs[2]]


def test_a_foreign_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing: no such directory"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(ValueError, match=r"neither a run nor a sweep; a run directory holds config\.yaml"):
        find_runs([tmp_path])
    checkpoint = make_run(tmp_path / "run" / "checkpoints" / "step-1")
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"it is a checkpoint; name its run"):
        find_runs([checkpoint])


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_summarised(tmp_path: Path) -> None:
    run = summarise(make_run(tmp_path / "a", losses=(4.0, 3.0, 2.0), val_losses=(3.5, 2.5, 2.75)))
    assert (run.state, run.step, run.max_steps, run.tokens) == ("finished", 3, 3, 192)
    assert (run.tokens_per_second, run.train_seconds) == (16.0, 8.0)
    assert (run.final_loss, run.best_val_loss, run.best_val_step) == (2.0, 2.5, 2)


def test_the_state_of_a_run_follows_from_its_files(tmp_path: Path) -> None:
    failed = make_run(tmp_path / "failed", exit_reason="failed")
    killed = make_run(tmp_path / "killed", exit_reason=None)
    pending = make_run(tmp_path / "pending", losses=(), exit_reason=None)
    going_on = make_run(tmp_path / "going on", exit_reason="interrupted")
    assert summarise(failed).state == "failed"
    assert summarise(killed).state == "interrupted"
    assert summarise(pending).state == "pending"
    with locked(going_on):
        assert summarise(going_on).state == "running"
    assert summarise(going_on).state == "interrupted"


def test_a_run_without_summary_is_read_from_its_metrics(tmp_path: Path) -> None:
    run = summarise(make_run(tmp_path / "a", losses=(4.0, 3.0, 2.0), exit_reason=None))
    assert (run.step, run.max_steps, run.tokens) == (3, 100, 192)
    assert run.train_seconds == pytest.approx(192 / 32)
    assert run.tokens_per_second == pytest.approx(32)


def test_a_summary_older_than_the_metrics_does_not_count(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", exit_reason="interrupted")
    with Local(log_every=1).build(path, resume_step=2) as metrics:
        metrics.row({"step": 9, "tokens": 576, "loss": 1.0, "tokens_per_second": 32.0})
    run = summarise(path)
    assert (run.state, run.step, run.max_steps, run.tokens, run.final_loss) == ("interrupted", 9, 100, 576, 1.0)


def test_a_late_event_does_not_make_a_summary_old(tmp_path: Path) -> None:
    """A save is told of when it is through, and a refused step of before a rollback stays on record."""
    path = make_run(tmp_path / "a", losses=(4.0, 3.0, 2.0))
    with Local(log_every=1).build(path, resume_step=3) as metrics:
        metrics.row({"event": "refused", "step": 9})
        metrics.row({"event": "save", "step": 2})
    assert (summarise(path).state, summarise(path).tokens_per_second) == ("finished", 16.0)
    with (path / "metrics.jsonl").open("a") as file:  # killed at a later step, of which a save came last
        file.write('{"step": 4, "tokens": 256, "loss": 1.0}\n{"event": "save", "step": 2}\n')
    assert (summarise(path).state, summarise(path).step) == ("interrupted", 4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("environment.json", "{", r"environment\.json: not JSON"),
        ("environment.json", "[]", r"environment\.json: not a run's environment"),
        ("config.yaml", "a: [", r"config\.yaml: not YAML"),
        ("config.yaml", "!!python/object/apply:os.system [echo]", r"config\.yaml: not YAML"),
        ("config.yaml", "- a", r"config\.yaml: not a run's config"),
        ("summary.json", "{", r"summary\.json: not JSON"),
        ("summary.json", "[]", r"summary\.json: not a run's summary"),
        ("metrics.jsonl", "x\n", r"metrics\.jsonl, line 1: not JSON"),
    ],
)
def test_a_corrupt_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = make_run(tmp_path / "a")
    (path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        summarise(path)


# --- comparing ---------------------------------------------------------------------------------------------------


def test_runs_are_ranked_by_validation_loss(tmp_path: Path) -> None:
    make_run(tmp_path / "a", val_losses=(math.nan,), losses=(1.0,))
    make_run(tmp_path / "b", losses=(math.nan,))
    make_run(tmp_path / "c", val_losses=(3.0, math.nan), losses=(9.0,))
    make_run(tmp_path / "d", val_losses=(2.0, 5.0))
    make_run(tmp_path / "e", losses=(0.5,))
    runs = ranked([summarise(run) for run in find_runs([tmp_path])])
    assert [run.path.name for run in runs] == ["d", "c", "e", "a", "b"]


def test_a_classifier_is_judged_by_its_accuracy(tmp_path: Path) -> None:
    """It grows surer of itself: the loss of its mistakes rises, and they grow fewer."""
    runs = [make_run(tmp_path / name, losses=(1.0,) * 3) for name in ("a", "b")]
    found = {"a": [(0.2, 0.9), (0.3, 0.95), (0.4, 0.95)], "b": [(0.1, 0.8), (0.2, 0.94), (0.5, 0.93)]}
    for run in runs:
        with Local(log_every=1).build(run, resume_step=3) as metrics:
            for step, (loss, accuracy) in enumerate(found[run.name], start=1):
                metrics.row({"step": step, "tokens": step, "val_loss": loss, "accuracy": accuracy, "macro_f1": 0.5})
    best = ranked([summarise(run) for run in runs])
    assert [(run.path.name, run.best_val_step, run.accuracy, run.best_val_loss) for run in best] == [
        ("a", 2, 0.95, 0.3), ("b", 2, 0.94, 0.2),
    ]  # fmt: skip
    assert _unit(best) == "loss (nats per text)"
    assert _unit([*best, summarise(make_run(tmp_path / "c"))]) == "loss"


def test_the_settings_that_differ_are_found(tmp_path: Path) -> None:
    other = {"_target_": "llmtrain.optimizer.lion.Lion", "lr": 1e-3, "beta": 0.9}
    a, b = make_run(tmp_path / "a", lr=3e-4), make_run(tmp_path / "b", optimizer=other)
    assert differences([summarise(a), summarise(b)]) == {"optimizer": ["adamw", "lion"], "optimizer.lr": [3e-4, 1e-3]}
    assert differences([summarise(a)]) == {}


def test_the_table_of_a_sweep(tmp_path: Path) -> None:
    make_run(tmp_path / "job-1", lr=1e-3, val_losses=(3.0,))
    make_run(tmp_path / "job-2", lr=3e-3, val_losses=(2.5,), exit_reason="failed")
    make_run(tmp_path / "job-3 [red]\x1b[2J", lr=1e-2, losses=(), exit_reason=None)
    heading, *rows = [" ".join(line.split()) for line in show(sweep_table(tmp_path)).splitlines()]
    assert heading == "run optimizer.lr val loss at step train loss step tokens tok/s time state"
    assert rows[0] == "job-2 0.003 2.5000 1 3.0000 2/2 128 16.0 8.0 s failed"
    assert rows[1] == "job-1 0.001 3.0000 1 3.0000 2/2 128 16.0 8.0 s finished"
    assert rows[2] == r"job-3 [red]\x1b[2J 0.01 - - - 0/100 0 - - pending"


def test_every_setting_that_differs_is_shown(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, model={f"key{index}": f"{name}{index}" for index in range(7)})
    text = show(sweep_table(tmp_path))
    for index in range(7):
        assert f"model.key{index}" in text


# --- branches ----------------------------------------------------------------------------------------------------


def make_branch(path: Path, parent: Path, step: int, **settings: Any) -> Path:
    run = make_run(path, **settings)
    (run / "environment.json").write_text(json.dumps({"parent": {"run": str(parent), "step": step}}))
    return run


def test_a_branch_names_its_parent(tmp_path: Path) -> None:
    parent = make_run(tmp_path / "parent", val_losses=(3.0,))
    child = make_branch(tmp_path / "child [b]", parent, 1200, val_losses=(2.5,))
    assert summarise(parent).parent is None
    assert summarise(child).parent == ("parent", 1200)
    heading, first, second = [" ".join(line.split()) for line in show(sweep_table(tmp_path)).splitlines()]
    assert heading.startswith("run from val loss")
    assert first.startswith("child [b] parent at step 1,200 2.5000")
    assert second.startswith("parent 3.0000")
    labels = _labels([summarise(child), summarise(parent)])
    assert labels == ["child [b] (from parent at step 1,200)", "parent"]
    for text in ("[]", '{"parent": 3}', '{"parent": {"run": "x"}}'):  # none of ours
        (child / "environment.json").write_text(text if text != "[]" else "{}")
        assert summarise(child).parent is None


def diamonds(figure_axes: Any) -> list[tuple[float, float]]:
    return [(*line.get_xdata(), *line.get_ydata()) for line in figure_axes.lines if line.get_marker() == "D"]


def test_the_comparison_marks_where_a_branch_leaves(tmp_path: Path) -> None:
    """In each panel, on the branch's own curve, at its last point from the parent."""
    at = [0.0, 1.0, 2.0, 3.0]
    curves = [(at, [5.0, 4.0, 3.5, 3.0]), (at, [5.0, 4.0, 3.0, 2.5])]
    axes = Figure().subplots()
    lines = _draw_panel(axes, curves, [0, 2], ["red", "blue"], smooth=False)
    assert [line.get_color() for line in lines] == ["red", "blue"]
    assert diamonds(axes) == [(1.0, 4.0)]


def test_parent_and_child_are_drawn_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = make_run(tmp_path / "a", losses=(4.0, 3.0, 2.0), val_losses=(4.0, 3.0))
    child = make_branch(tmp_path / "b", parent, 2, losses=(4.0, 3.0, 1.0), val_losses=(4.0, 2.0))
    plain = make_run(tmp_path / "c", losses=(4.0, 3.0, 1.0), val_losses=(4.0, 2.0))
    assert main(Report(output=None, plot=True), Invocation([parent, child], [])) == 0
    assert "a at step 2" in capsys.readouterr().out
    marked, unmarked = imread(tmp_path / "report.png"), imread(draw_comparison([parent, plain], tmp_path / "c.png"))
    assert marked.shape != unmarked.shape or (marked != unmarked).any()


# --- drawing -----------------------------------------------------------------------------------------------------


def test_a_run_is_drawn_with_any_name_and_nonfinite_losses(tmp_path: Path) -> None:
    losses = tuple(10 * 0.9**step for step in range(50))
    run = make_run(tmp_path / "$a_1 & \\frac[bold]", losses=(*losses, math.nan, 1.0), val_losses=(9.0, 5.0, math.inf))
    picture = draw_run(run)
    assert picture == run / "loss.png"
    width, height = size_of(picture)
    assert width >= 600
    assert height >= 400
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize(("losses", "val_losses"), [((), ()), ((3.0,), ()), ((), (3.0,)), ((math.nan,), (math.nan,))])
def test_a_run_with_hardly_any_row_is_drawn(tmp_path: Path, losses: tuple, val_losses: tuple) -> None:
    assert draw_run(make_run(tmp_path / "a", losses=losses, val_losses=val_losses)).stat().st_size > 0


def test_the_curves_are_in_the_picture(tmp_path: Path) -> None:
    """Not by its look: the picture of a run has ink in each colour, the one of an empty run has none of them."""

    def ink(picture: Path) -> list[int]:
        pixels = (imread(picture)[:, :, :3] * 255).round().astype(int)
        colours = np.array([(0x3B, 0x6E, 0xA8), (0xD1, 0x60, 0x3D), (0x6B, 0x6B, 0x6B)])
        return [int((abs(pixels - colour).sum(-1) == 0).sum()) for colour in colours]

    full = ink(draw_run(make_run(tmp_path / "a", losses=(4.0, 3.0, 2.0), val_losses=(4.0, 3.5, 3.0))))
    empty = ink(draw_run(make_run(tmp_path / "b", losses=())))
    assert min(full) > 100
    assert max(empty) < min(full) / 10


def test_smoothing_does_not_lag(tmp_path: Path) -> None:
    line = [float(value) for value in range(200)]
    assert _smooth(line)[50:150] == pytest.approx(line[50:150], abs=0.1)
    gap = _smooth([1.0, math.nan, 3.0])
    assert math.isnan(gap[1])
    assert gap[0] < gap[2]


@pytest.mark.parametrize("number", [2, 14])
def test_the_comparison_grows_with_the_number_of_runs(tmp_path: Path, number: int) -> None:
    runs = [
        make_run(tmp_path / f"_job{index}", lr=index * 1e-4, losses=(4.0 + index, 3.0, 1e6 if index == 1 else 2.0))
        for index in range(number)
    ]
    narrow = size_of(draw_comparison(runs, tmp_path / "narrow.png"))
    for run in runs:
        with Local(log_every=1).build(run, resume_step=3) as metrics:
            metrics.row({"step": 3, "tokens": 192, "val_loss": 3.0})
    wide = size_of(draw_comparison(runs, tmp_path / "wide.png"))
    assert wide[0] > narrow[0]  # a panel more: the validation loss


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", lr=1e-3), make_run(tmp_path / "b", lr=3e-4)]
    assert _labels([summarise(run) for run in runs]) == ["optimizer.lr=0.001", "optimizer.lr=0.0003"]
    runs.append(make_run(tmp_path / "_c", lr=3e-4))
    assert _labels([summarise(run) for run in runs]) == [
        "a optimizer.lr=0.001",
        "b optimizer.lr=0.0003",
        " _c optimizer.lr=0.0003",
    ]


# --- the command -------------------------------------------------------------------------------------------------


def test_report_of_a_sweep_writes_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(2):
        make_run(tmp_path / f"job-{index}", lr=1e-3 * (index + 1), val_losses=(3.0 - index,))
    make_run(tmp_path / "job-2", lr=1.0, losses=(), exit_reason=None)
    assert main(Report(output=None, plot=True), Invocation([tmp_path], [])) == 0
    output = capsys.readouterr().out
    assert output.index("job-1") < output.index("job-0") < output.index("job-2")
    assert f"curves: {tmp_path / 'report.png'}" in output
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == [
        "job-0/loss.png",
        "job-1/loss.png",
        "report.png",
    ]


def test_report_compares_runs_named_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "x" / "a"), make_run(tmp_path / "y" / "b", lr=1.0)]
    assert main(Report(output=None, plot=True), Invocation(runs, [])) == 0
    assert (tmp_path / "x" / "report.png").exists()
    assert main(Report(output=None, plot=False), Invocation(runs[:1], [])) == 0
    assert not (runs[0] / "report.png").exists()
    assert main(Report(output=str(tmp_path / "mine.png"), plot=True), Invocation(runs, [])) == 0
    assert (tmp_path / "mine.png").exists()
    assert "mine.png" in capsys.readouterr().out


def test_the_output_of_one_run_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = make_run(tmp_path / "a"), tmp_path / "mine.png"
    assert main(Report(output=str(output), plot=True), Invocation([run], [])) == 0
    assert output.read_bytes() == (run / "loss.png").read_bytes()
    assert f"curves: {run / 'loss.png'}, {output}" in capsys.readouterr().out


def test_an_output_that_would_not_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^output=mine\.png: with plot=false nothing is drawn"):
        Report(output="mine.png", plot=False)
    pending = make_run(tmp_path / "a", losses=(), exit_reason=None)
    with pytest.raises(ValueError, match=r"^output=.*mine\.png: no run has begun"):
        main(Report(output=str(tmp_path / "mine.png"), plot=True), Invocation([pending], []))
    assert not (tmp_path / "mine.png").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("curves.pdf", r"^output=curves\.pdf: the picture is a PNG"),
        ("no/where.png", r"^output=no/where\.png: there is no"),
    ],
)
def test_report_refuses_an_output_that_cannot_be(tmp_path: Path, output: str, message: str) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    with pytest.raises(ValueError, match=message):
        main(Report(output=output, plot=True), Invocation(runs, []))


def test_a_wide_table_is_not_wrapped_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / ("long-name-" * 10))
    main(Report(output=None, plot=False), Invocation([tmp_path], []))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_single_run_has_no_settings_column(tmp_path: Path) -> None:
    assert "optimizer.lr" not in show(Comparison([summarise(make_run(tmp_path / "a"))]))


def test_a_narrow_terminal_keeps_losses_and_states(tmp_path: Path) -> None:
    make_run(tmp_path / "first-run", lr=1e-3, val_losses=(3.25,))
    make_run(tmp_path / "second-run", lr=3e-3, val_losses=(2.5,), exit_reason="failed")
    text = show(sweep_table(tmp_path), width=70)
    for expected in ("first-run", "second-run", "optimizer.lr", "3.2500", "2.5000", "failed", "no room for at step"):
        assert expected in text
    assert "…" not in text
    assert "no room" not in show(sweep_table(tmp_path), width=120)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_headings_are_never_broken(tmp_path: Path, width: int) -> None:
    """Settings that find no room are told below the table instead of being broken."""
    names = [f"setting_with_a_long_name_{index}" for index in range(5)]
    for run in ("one", "two"):
        make_run(tmp_path / run, model={name: f"{run}-{name}" for name in names})
    heading, *below = show(sweep_table(tmp_path), width=width).splitlines()
    for shown in (word for word in heading.split() if "setting" in word):
        assert shown.removeprefix("model.") in names
    assert {"run", "state"} <= set(heading.split())
    text = " ".join(line.strip() for line in (heading, *below))
    assert all(f"model.{name}" in text for name in names)


# --- runs that cannot be compared --------------------------------------------------------------------------------


def validated(path: Path, losses: dict[int, float], digest: str | None, train: float = 3.0, **config: Any) -> Path:
    """A run with these validation losses by step, on data of that digest."""
    run = make_run(path, losses=(4.0, train), **config)
    with Local(log_every=1).build(run, resume_step=99) as metrics:
        for step, loss in losses.items():
            known = {} if digest is None else {"val_data": digest}
            metrics.row({"step": step, "tokens": 64 * step, **known, "val_loss": loss})
    return run


def test_runs_are_ranked_among_those_with_the_same_validation_data(tmp_path: Path) -> None:
    data = {"data": {"path": "corpus", "cache_dir": "one", "sequence_length": 32}}
    runs = [
        validated(tmp_path / "a", {0: 5.0, 2: 3.1}, "11111111", **data),
        validated(tmp_path / "b", {0: 5.0, 2: 1.5}, "22222222", data={**data["data"], "path": "easy.txt"}),
        validated(tmp_path / "c", {0: 5.0, 2: 2.9}, "11111111", data={**data["data"], "path": "moved/corpus"}),
        make_run(tmp_path / "pending", losses=(), exit_reason=None, **data),
    ]
    text = show(comparisons([summarise(run) for run in runs]))
    assert "cannot be compared" in text
    places = [
        text.index(word) for word in ("data.path=corpus", "\nc ", "\na ", "\npending", "data.path=easy.txt", "\nb ")
    ]
    assert places == sorted(places), text
    alone = show(comparisons([summarise(runs[0]), summarise(runs[2])]))
    assert "cannot be compared" not in alone


def test_runs_without_a_digest_are_compared_by_their_settings(tmp_path: Path) -> None:
    same = {"data": {"path": "corpus", "shuffle": True}}
    older = validated(tmp_path / "older", {2: 3.0}, None, **same)
    newer = validated(tmp_path / "newer", {2: 3.0}, "11111111", data={"path": "corpus", "shuffle": False})
    other = validated(tmp_path / "other", {2: 3.0}, "11111111", data={"path": "corpus2", "shuffle": True})
    groups = by_validation_data([summarise(run) for run in (older, newer, other)])
    assert [[run.path.name for run in group] for group in groups] == [["older", "newer"], ["other"]]


def test_a_best_before_training_is_marked_and_ranked_last(tmp_path: Path) -> None:
    diverged = validated(tmp_path / "diverged", {0: 5.5533, 2: 9.0}, "1", train=8.0)
    lost = validated(tmp_path / "lost", {0: 5.5, 2: math.nan}, "1", train=math.nan)
    worse = validated(tmp_path / "worse", {0: 5.5533, 2: 5.4}, "1")
    text = show(comparisons([summarise(run) for run in (diverged, lost, worse)]))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["worse", "lost", "diverged"]
    assert "5.5533*" in lines[3]
    assert lines[3].rstrip().endswith("finished, diverged")
    assert lines[2].rstrip().endswith("finished, diverged")
    assert "diverged" not in lines[1]
    assert "*" not in lines[1]
    assert "* before training" in text


def test_settings_that_train_nothing_are_no_columns(tmp_path: Path) -> None:
    runs = []
    for at in (1, 2):
        config = {"checkpoint": {"keep_last": at}, "metrics": {"log_every": at}, "loop": {"sample_every": at}}
        runs.append(make_run(tmp_path / str(at), lr=at, **config))
    assert list(differences([summarise(run) for run in runs])) == ["optimizer.lr"]
