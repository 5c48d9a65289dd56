"""Signals: the first requests a stop, a second one ends the process, and previous handlers are called at the end."""

import signal
import subprocess
import sys

import pytest

from llmtrain.train.signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_recorded_and_the_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert stop.signal_name is None
        signal.raise_signal(number)
        assert stop.signal_name == number.name
    assert signal.getsignal(number) == before


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal_name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_earlier_handler_is_called_after_the_save() -> None:
    order = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: order.append(signal.Signals(number).name))
    try:
        with stop_on_signals():
            signal.raise_signal(signal.SIGUSR2)
            order.append("saved")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert order == ["saved", "SIGUSR2"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ("SIGINT",),
            ["SIGINT: the run stops and saves after this step or evaluation batch; a second signal exits at"],
        ),
        (
            ("SIGUSR1", "SIGTERM"),
            [
                "SIGUSR1: the run stops and saves after this step or evaluation batch; SIGTERM or SIGINT may follow",
                "SIGTERM: the run stops already, after SIGUSR1; a further signal exits at once",
            ],
        ),
    ],
)
def test_a_signal_is_answered_at_once(
    names: tuple[str, ...], said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_on_signals():
        for name in names:
            before = capfd.readouterr().err
            assert not before or before.startswith(said[0])
            signal.raise_signal(getattr(signal, name))
        assert capfd.readouterr().err.startswith(said[-1])


def test_a_signal_that_comes_twice_from_a_scheduler_and_a_supervisor_counts_once() -> None:
    program = TWO.replace("stop_on_signals()", "stop_on_signals(doubled_seconds=30.0)")
    once = subprocess.run([sys.executable, "-c", program, "SIGTERM", "SIGTERM"], capture_output=True, text=True)
    assert once.stdout == "still here SIGTERM\n"
    another = subprocess.run([sys.executable, "-c", program, "SIGTERM", "SIGTERM", "SIGINT"], capture_output=True)
    assert another.returncode == 130


def test_a_closed_stderr_does_not_matter() -> None:
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" SIGTERM 2>&-', sys.executable, TWO], capture_output=True)
    assert done.stdout == b"still here SIGTERM\n"


TWO = """
import signal, sys
from llmtrain.train.signals import stop_on_signals
with stop_on_signals() as stop:
    for name in sys.argv[1:]:
        signal.raise_signal(getattr(signal, name))
    print("still here", stop.signal_name)
"""


@pytest.mark.parametrize(
    ("names", "status"),
    [
        (("SIGTERM", "SIGTERM"), 143),
        (("SIGTERM", "SIGINT"), 130),
        (("SIGINT", "SIGUSR1"), 138),
        (("SIGUSR1", "SIGUSR1"), 138),
        (("SIGUSR1", "SIGTERM"), 0),  # the SIGTERM that the warning announced: the save goes on
        (("SIGUSR1", "SIGTERM", "SIGTERM"), 143),
        (("SIGHUP", "SIGHUP", "SIGTERM", "SIGHUP"), 0),  # of a terminal that is closed, and of the session's end
        (("SIGTERM", "SIGHUP"), 0),
        (("SIGHUP", "SIGUSR1"), 138),
    ],
)
def test_a_second_signal_ends_at_once(names: tuple[str, ...], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", TWO, *names], capture_output=True, text=True)
    assert done.returncode == status
    assert ("still here" in done.stdout) == (status == 0)
