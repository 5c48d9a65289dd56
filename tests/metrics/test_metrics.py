"""The metrics file: rows are read as written, and rows that a resumed run writes again are dropped."""

import json
import math
from pathlib import Path

import pytest

from llmtrain.metrics import drop_rows, read_metrics
from llmtrain.metrics.local import Local
from llmtrain.metrics.smoothing import EMA
from llmtrain.metrics.tensorboard import TensorBoard


def train(step: int, **values: object) -> dict:
    return {"step": step, "tokens": 100 * step, "loss": 1.0 / (step + 1), **values}


def write(run_dir: Path, *rows: dict, resume_step: int | None = None) -> Path:
    with Local(log_every=1).build(run_dir, resume_step=resume_step) as metrics:
        for row in rows:
            metrics.row(row)
    return run_dir / "metrics.jsonl"


def test_a_row_is_in_the_file_when_row_returns(tmp_path: Path) -> None:
    metrics = Local(log_every=1).build(tmp_path, resume_step=None)
    metrics.row(train(1))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":1,"tokens":100,"loss":0.5}\n'
    metrics.close()
    metrics.close()


def test_nonfinite_numbers_are_read_back_as_floats(tmp_path: Path) -> None:
    path = write(tmp_path, train(1, loss=math.nan, grad_norm=math.inf, low=[-math.inf, {"deep": math.nan}]))
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] == "nan"  # strict JSON: no NaN or Infinity in it
    (row,) = read_metrics(path)
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf
    assert row["low"][0] == -math.inf
    assert math.isnan(row["low"][1]["deep"])


def test_values_keep_type_and_precision(tmp_path: Path) -> None:
    row = train(3, loss=0.1 + 0.2, clipped=True, mfu=None, memory_bytes=2**40, text="ü\n\x1b[31m")
    assert read_metrics(write(tmp_path, row)) == [row]


def test_a_torn_last_line_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path, train(1), train(2))
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines(keepends=True)[1]) - 1):
        path.write_bytes(whole[:-cut])
        assert [row["step"] for row in read_metrics(path)] == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "lo', r"metrics\.jsonl, line 2: not JSON"),
        ("\x00\x00", r"metrics\.jsonl, line 2: not JSON"),
        ('["step"]', r"metrics\.jsonl, line 2: not an object with a step"),
        ('{"loss": 1.0}', r"metrics\.jsonl, line 2: not an object with a step"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, train(1))
    path.write_text(path.read_text() + line + "\n" + '{"step": 3}\n')
    with pytest.raises(ValueError, match=message):
        read_metrics(path)


def test_a_resumed_run_has_every_row_once(tmp_path: Path) -> None:
    """Saved at step 4, evaluated at 4 and 6, killed while writing row 7: the run continues from 4."""
    first = [
        train(3),
        train(4),
        {"event": "save", "step": 4, "path": "checkpoints/step-00000004"},
        {"step": 4, "tokens": 400, "val_loss": 2.0},
        train(5),
        {"event": "refused", "step": 5, "loss": math.inf},
        train(6),
        {"step": 6, "tokens": 600, "val_loss": 1.5},
    ]
    path = write(tmp_path, *first)
    path.write_text(path.read_text() + '{"step":7,"tok')
    again = [{"event": "resume", "step": 4}, train(5), train(6), first[7], train(7)]
    write(tmp_path, *again, resume_step=4)
    rows = read_metrics(path)
    assert rows[:5] == [*first[:4], first[5]]
    assert rows[5:] == again
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_to_drop_leaves_the_file_untouched(tmp_path: Path) -> None:
    path = write(tmp_path, train(1), train(2))
    before = path.stat().st_ino
    drop_rows(path, lambda row: row["step"] > 2)
    assert path.stat().st_ino == before
    drop_rows(path, lambda row: row["step"] > 1)
    assert path.stat().st_ino != before
    assert read_metrics(path) == [train(1)]


def test_a_resume_before_the_first_row_keeps_no_row(tmp_path: Path) -> None:
    assert read_metrics(write(tmp_path, train(1), resume_step=0)) == [train(1)]


def test_a_new_run_never_appends_to_another(tmp_path: Path) -> None:
    write(tmp_path, train(1))
    with pytest.raises(FileExistsError):
        write(tmp_path, train(1))


@pytest.mark.parametrize("option", [Local, TensorBoard])
def test_log_every_is_checked(option: type[Local | TensorBoard]) -> None:
    with pytest.raises(ValueError, match=r"^log_every=0: must be 1 or more steps$"):
        option(log_every=0)


def test_a_missing_tensorboard_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = TensorBoard(log_every=1)
    for act in (config.check, lambda: config.build(tmp_path, resume_step=None)):
        with pytest.raises(ValueError, match=r"pip install 'llmtrain\[tensorboard\]'"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TensorBoard(log_every=1)
    with config.build(tmp_path, resume_step=None) as metrics:
        for step in (1, 2, 3):
            metrics.row(train(step, clipped=step == 2))
        metrics.row({"event": "save", "step": 2, "path": "checkpoints/step-00000002"})
        metrics.row({"step": 2, "tokens": 200, "val_loss": 1.5})
    with config.build(tmp_path, resume_step=2) as metrics:
        metrics.row(train(3, loss=7.0))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2, 2, 3]

    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 0.5),
        (2, pytest.approx(1 / 3)),
        (3, 7.0),
    ]
    assert [event.value for event in events.Scalars("train/clipped")] == [0.0, 1.0]
    assert [(event.step, event.value) for event in events.Scalars("validation/val_loss")] == [(2, 1.5)]
    assert "event/save/text_summary" in events.Tags()["tensors"]


def test_the_moving_average_equals_its_formula() -> None:
    values, beta = [10.0, 4.0, 7.0], 0.8
    average = EMA(beta)
    for count in (1, 2, 3):
        weights = [beta ** (count - 1 - index) for index in range(count)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert average.update(values[count - 1]) == pytest.approx(expected, rel=1e-14)


def test_the_moving_average_skips_nonfinite_values() -> None:
    average = EMA(0.5)
    assert math.isnan(average.update(math.nan))
    assert average.update(3.0) == 3.0
    assert average.update(math.inf) == 3.0
