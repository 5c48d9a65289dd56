"""What a run shows: plain lines exactly, the live display on a real pseudo-terminal."""

import io
import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from rich.console import Console

from llmtrain.display import PlainDisplay, open_display
from llmtrain.display.live import LiveDisplay, can_draw
from llmtrain.display.progress import Progress

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
HOSTILE = "\x1b[2Jgone [bold red]loud[/]\x07"
ROW = {
    "step": 10, "tokens": 20480, "loss": 3.45214, "learning_rate": 3e-4, "grad_norm": 0.8312, "grad_max": 0.04,
    "clipped": False, "tokens_per_second": 12345.6, "mfu": 0.341, "step_seconds": 0.083, "memory_bytes": 1_490_000_000,
}  # fmt: skip
SUMMARY = {
    "exit_reason": "interrupted", "name": "tiny", "step": 120, "max_steps": 5000, "tokens": 245_760,
    "train_seconds": 3725.0, "tokens_per_second": 65.98, "final_loss": 3.1, "final_val_loss": 3.4,
    "best_val_loss": 3.3, "best_val_step": 100, "refused_steps": 2, "parameters": 1000,
}  # fmt: skip


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A pseudo-terminal whose output is kept."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._read = bytearray()
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()

    def _drain(self) -> None:
        try:
            while chunk := os.read(self.master, 65536):
                self._read += chunk
        except OSError:  # Linux says so when the other side has closed
            return

    def output(self) -> str:
        """All that was written; closes the terminal."""
        self.stream.close()
        self._reader.join(timeout=10)
        return self._read.decode("utf-8")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    yield terminal
    terminal.output()
    os.close(terminal.master)


def say_everything(display: Any, clock: Clock) -> None:
    display.header([("model", "tiny, 1.2M parameters"), ("validation", HOSTILE)])
    display.start(0, 5000)
    for step in range(1, 11):
        clock.now += 0.5
        display.step(step)
    display.row(ROW)
    display.validation({"step": 10, "tokens": 20480, "val_loss": 3.4012})
    display.sample(10, "Every effort", f" moves {HOSTILE}\n\ton, café")
    display.event(
        {"event": "save", "step": 10, "path": "checkpoints/step-00000010", "bytes": 2_000_000, "seconds": 0.42}
    )
    examples = [{"sequence": 1234, "loss": 9.5, "text": "bad\x1b[2J\ntext"}]
    display.event(
        {"event": "refused", "step": 10, "loss": math.nan, "reason": "loss nan, not finite", "examples": examples}
    )
    changes = [["optimizer.lr", 0.001, 0.0003]]
    display.event({"event": "resume", "step": 10, "changes": changes, "rates": [0.001, 0.0003]})
    display.warn(HOSTILE)


PLAIN = r"""model       tiny, 1.2M parameters
validation  \x1b[2Jgone [bold red]loud[/]\x07
step    10/5,000  loss  3.4521  lr 3.0e-04  grad norm    0.831  12.3k tok/s  mfu 34.1%  1.49 GB  41m 35s left
step    10/5,000  validation loss 3.4012  perplexity 30.0
step    10/5,000  sample
    Every effort moves \x1b[2Jgone [bold red]loud[/]\x07
    {tab}on, café
step    10/5,000  save  checkpoints/step-00000010  2.00 MB  420 ms
step    10/5,000  refused  loss nan, not finite
    sequence 1,234, loss 9.5000: bad\x1b[2J text
step    10/5,000  resume
    key           stored  now
    optimizer.lr  0.001   0.0003
    learning rate at step 11: 1.00e-03 -> 3.00e-04
warning: \x1b[2Jgone [bold red]loud[/]\x07
""".replace("{tab}", "\t")


def test_plain_output_has_a_line_for_each_event(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    with PlainDisplay(tmp_path, stream, clock) as display:
        say_everything(display, clock)
    assert stream.getvalue() == PLAIN


@pytest.mark.parametrize("kind", [PlainDisplay, LiveDisplay])
def test_the_log_has_the_same_lines_with_the_time(tmp_path: Path, terminal: Terminal, kind: type) -> None:
    clock = Clock()
    with kind(tmp_path, terminal.stream, clock) as display:
        say_everything(display, clock)
    log = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", log) == PLAIN


def test_an_interrupted_run_is_summarised_with_its_resume_command(tmp_path: Path) -> None:
    run_dir, stream = tmp_path / "it's $(here)", io.StringIO()
    run_dir.mkdir()
    with PlainDisplay(run_dir, stream) as display:
        display.summary(SUMMARY)
    quoted = "'" + str(run_dir).replace("'", "'\"'\"'") + "'"
    assert stream.getvalue() == (
        "interrupted at step 120 of 5,000\n"
        "  train loss       3.1000\n"
        "  validation loss  3.4000 (best 3.3000 at step 100, not kept: checkpoint.keep_best=1 keeps it)\n"
        "  tokens           246k\n"
        "  time             1h 02m\n"
        "  throughput       66.0 tok/s\n"
        "  refused steps    2 (not finite, or far from the usual)\n"
        f"  run directory    {run_dir}\n"
        "next\n"
        f"  llmtrain resume {quoted}\n"
        f'  llmtrain generate {quoted} prompt="…"\n'
        f"  llmtrain report {quoted}\n"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"best_val_step": 0, "keep_best": 1}, "validation loss  3.4000 (best 3.3000 at step 0, before training)"),
        ({"keep_best": 1}, "validation loss  3.4000 (best 3.3000 at step 100, which has no checkpoint)"),
        ({"best_val_step": 120}, "validation loss  3.4000 (best 3.3000 at step 120)"),
        (
            {"accuracy": 0.93, "macro_f1": 0.9, "best_accuracy": 0.95},
            "accuracy         93.0%, macro-F1 0.900 (best 95.0% at step 100, "
            "not kept: checkpoint.keep_best=1 keeps it)",
        ),
    ],
)
def test_the_best_step_is_named_and_a_missing_checkpoint_is_said(tmp_path: Path, changes: dict, line: str) -> None:
    stream = io.StringIO()
    with PlainDisplay(tmp_path, stream) as display:
        display.summary(SUMMARY | changes)
    assert f"  {line}\n" in stream.getvalue()


@pytest.mark.parametrize(
    ("keeps", "note"), [(True, ", kept)"), (False, ", still there; checkpoint.keep_best=1 keeps it)")]
)
def test_the_best_checkpoint_is_kept_only_by_a_setting(tmp_path: Path, keeps: bool, note: str) -> None:
    (tmp_path / "checkpoints" / "step-00000100").mkdir(parents=True)
    stream = io.StringIO()
    with PlainDisplay(tmp_path, stream) as display:
        display.summary(SUMMARY | {"keeps_best": keeps})
    assert f"(best 3.3000 at step 100{note}\n" in stream.getvalue()


def test_a_notice_is_shown_with_the_next_drawing(tmp_path: Path, terminal: Terminal) -> None:
    with LiveDisplay(tmp_path, terminal.stream, Clock()) as display:
        assert not display.notify("too early to be drawn")
        display.start(0, 5000)
        assert display.notify("SIGINT: the run stops")
        display.row(ROW)
        display.warn("redraws")
    output = terminal.output()
    assert "SIGINT: the run stops" in output
    assert "too early" not in output


def test_a_finished_run_offers_no_resume(tmp_path: Path) -> None:
    stream = io.StringIO()
    with PlainDisplay(tmp_path, stream) as display:
        display.summary(SUMMARY | {"exit_reason": "finished", "final_val_loss": None, "refused_steps": 0})
    assert "llmtrain resume" not in stream.getvalue()
    assert stream.getvalue().endswith(f"  llmtrain export {tmp_path} to=DIR\n")
    assert "validation" not in stream.getvalue()
    assert "refused" not in stream.getvalue()


def test_an_encoding_without_the_letters_does_not_end_the_run(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with PlainDisplay(tmp_path, io.TextIOWrapper(raw, encoding="ascii")) as display:
        display.sample(1, "caf", "é")
        assert raw.getvalue().decode("ascii").splitlines()[-1] == r"    caf\xe9"
    assert "café" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_a_closed_pipe_does_not_end_the_run(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    os.close(reader)
    with PlainDisplay(tmp_path, stream) as display:
        display.warn("one")
        display.warn("two")
    log = (tmp_path / "train.log").read_text()
    assert "warning: one" in log
    assert "Broken pipe" in log
    assert "warning: two" in log
    stream.close()  # does not raise: what was in the buffer went nowhere


def test_progress_leaves_the_first_step_out_of_the_estimate() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.start(100, 1000)
    assert progress.remaining_seconds is None
    clock.now += 60  # compilation
    progress.advance(101)
    assert progress.remaining_seconds is None
    for step in range(102, 112):
        clock.now += 2
        progress.advance(step)
    assert progress.elapsed_seconds == 80
    assert progress.remaining_seconds == 2 * (1000 - 111)
    progress.advance(1000)
    assert progress.remaining_seconds == 0


# --- live --------------------------------------------------------------------------------------------------------


def test_a_terminal_gets_the_live_display_and_a_pipe_plain_lines(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kind(stream: TextIO) -> type:
        with open_display(tmp_path, stream) as display:
            return type(display)

    assert kind(terminal.stream) is LiveDisplay
    assert kind(io.StringIO()) is PlainDisplay
    terminal.stream.reconfigure(encoding="ascii")
    assert kind(terminal.stream) is PlainDisplay
    terminal.stream.reconfigure(encoding="utf-8")
    monkeypatch.setenv("TERM", "dumb")
    assert not can_draw(terminal.stream)


def test_the_live_display_shows_control_characters_without_obeying_them(tmp_path: Path, terminal: Terminal) -> None:
    clock = Clock()
    with LiveDisplay(tmp_path, terminal.stream, clock) as display:
        say_everything(display, clock)
        print("from a plug-in")
        display.summary(SUMMARY)
    output = terminal.output()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert r"\x1b[2Jgone [bold red]loud[/]\x07" in text
    assert "\x1b[2J" not in output
    assert "\x07" not in output
    for expected in ("━", "10/5,000", "smoothed", "3.4521", "12.3k", "34.1%", "1.49 GB", "validation loss 3.4012"):
        assert expected in text
    assert "from a plug-in" in text
    assert text.rstrip().endswith(f"llmtrain report {tmp_path}")
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_restores_the_terminal(tmp_path: Path, terminal: Terminal, error: type[BaseException]) -> None:
    def train() -> None:
        with LiveDisplay(tmp_path, terminal.stream) as display:
            display.start(0, 10)
            raise error

    with pytest.raises(error):
        train()
    output = terminal.output()
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)


def test_the_display_can_be_closed_from_a_signal_handler(tmp_path: Path, terminal: Terminal) -> None:
    with LiveDisplay(tmp_path, terminal.stream) as display:
        before = signal.signal(signal.SIGUSR1, lambda number, frame: display.close())
        try:
            display.start(0, 10)
            signal.raise_signal(signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)
    output = terminal.output()
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)


@pytest.mark.parametrize("width", [1, 12, 20, 40, 60, 80, 140, 300])
def test_the_panel_fits_every_width(tmp_path: Path, terminal: Terminal, width: int) -> None:
    with LiveDisplay(tmp_path, terminal.stream, Clock()) as display:
        display.progress.start(0, 5000)
        display.progress.advance(10)
        display.row(ROW)
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        lines = console.render_lines(display._panel(), pad=False)
        assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
        shown = "\n".join("".join(segment.text for segment in line) for line in lines)
    if width >= 20:
        for expected in ("3.4521", "3.0e-04", "0.831", "12.3k", "34.1%", "1.49 GB", "10/5,000"):
            assert expected in shown


def test_a_narrower_terminal_is_cleared_completely(tmp_path: Path, terminal: Terminal) -> None:
    """A terminal wraps what no longer fits: the redraw must go up by the rows that are there now."""
    with LiveDisplay(tmp_path, terminal.stream, Clock()) as display:
        display.start(0, 5000)
        render = display._live._live_render
        lines = render._line_widths
        assert max(lines) == 80
        wrapped = sum(math.ceil(line / 30) for line in lines)
        assert wrapped > len(lines)
        with display._live._lock:  # not to be redrawn in between
            display._console.width = 30
            codes = render.position_cursor().segment.text
        assert codes.count("\x1b[1A") == wrapped - 1


def test_a_loss_that_is_not_finite_stays_out_of_the_average(tmp_path: Path, terminal: Terminal) -> None:
    with LiveDisplay(tmp_path, terminal.stream, Clock()) as display:
        for loss in (4.0, math.nan, 4.0):
            display.row(ROW | {"loss": loss})
        cells = dict(display._cells())
    assert cells["smoothed"].plain == "4.0000"


def test_a_terminal_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, terminal: Terminal) -> None:
    number = terminal.stream.fileno()
    with LiveDisplay(tmp_path, terminal.stream) as display:
        kept, full = os.dup(number), os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, number)
        display.warn("one")
        display.warn("two")
    os.dup2(kept, number)
    os.close(kept)
    os.close(full)
    log = (tmp_path / "train.log").read_text()
    assert "No space left" in log
    assert "warning: two" in log
    assert "two" not in terminal.output()
