"""The cause of a job's failure among the ends of its ranks."""

import signal
from pathlib import Path

import pytest

from llmtrain.distributed.cause import RankEnd, describe, find_cause
from llmtrain.distributed.supervision import Failure, Kind, Supervision, kind_of

CLOSED = "[gloo] Connection closed by peer [127.0.0.1]:4040\nException raised from recv at x.cc:3\nframe #0: main"


def end(rank: int, status: int, message: str = "", *, order: int = 0, time: float = 0.0, by_us: bool = False,
        kind: Kind | None = None, is_shown: bool = False) -> RankEnd:  # fmt: skip
    failure = Failure(rank, "h", kind or kind_of(message), message, time, is_shown) if message else None
    return RankEnd(rank, "h", status, order, failure, None, (), by_us)


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        # the victim of a signal is seen after its consequences
        ([end(0, 1, CLOSED), end(2, 1, CLOSED, order=1), end(1, -9, order=2)], 1),
        # torch's watchdog aborts a process whose peer is gone
        ([end(0, -signal.SIGABRT), end(1, 1, "index out of range", order=1)], 1),
        # the earliest error that is the rank's own
        ([end(0, 1, CLOSED, time=1.0), end(1, 1, "later", time=3.0), end(2, 1, "earlier", time=2.0)], 2),
        # the same message everywhere, as when the loss diverges: rank 0 has shown it
        ([end(1, 1, "loss is nan", time=1.0), end(0, 1, "loss is nan", time=2.0, order=1)], 0),
        # ranks that were ended with the others
        ([end(0, -15, by_us=True), end(1, 1, "full disk", order=1), end(2, -9, by_us=True, order=2)], 1),
        # a heartbeat names a stopped rank, which the supervisor has to kill
        ([end(0, 1, "no heartbeat from rank 1", kind=Kind.verdict), end(1, -9, by_us=True, order=1)], 0),
        # nothing but consequences, as when a link is cut
        ([end(1, 1, CLOSED, time=2.0), end(0, 1, CLOSED, time=1.0, order=1)], 0),
    ],
)
def test_the_cause_is_found(ends: list[RankEnd], rank: int) -> None:
    cause = find_cause(ends)
    assert cause is not None
    assert cause.rank == rank


def test_ranks_that_are_well_are_no_cause() -> None:
    assert find_cause([end(0, 0), end(1, 75)]) is None


def test_a_message_is_one_line_without_stack_frames() -> None:
    (line,) = describe(end(1, 1, CLOSED), [end(0, 0), end(1, 1, CLOSED)], None)
    assert line.startswith(
        "llmtrain: rank 1 on h failed with exit status 1: [gloo] Connection closed by peer [127.0.0.1]"
    )
    assert "frame" not in line


def test_a_message_that_rank_0_has_shown_is_not_repeated(tmp_path: Path) -> None:
    shown = end(0, 1, "loss is nan", is_shown=True)
    (line,) = describe(shown, [shown, end(1, 1, "loss is nan")], tmp_path)
    assert "its message is above" in line
    assert f"the run: {tmp_path}" in line
    verdict = end(0, 1, "no heartbeat from rank 1", kind=Kind.verdict, is_shown=True)
    assert not list(describe(verdict, [verdict], tmp_path))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("x"), Kind.consequence),
        ("Timed out waiting 8000ms for recv operation to complete", Kind.consequence),
        ("NCCL WARN ... ncclRemoteError: A call failed possibly due to a network error", Kind.consequence),
        (KeyError("weights"), Kind.error),
        (OSError(28, "No space left on device"), Kind.error),
    ],
)
def test_consequences_are_told_from_errors_of_a_rank_of_its_own(error: BaseException | str, kind: Kind) -> None:
    assert kind_of(error) is kind


def test_the_first_message_of_a_rank_counts(tmp_path: Path) -> None:
    supervision = Supervision(tmp_path, 3, "b")
    supervision.report_failure(ValueError("first"), status=2)
    supervision.report_failure("second")
    found = Failure.read(tmp_path / "failure-00003")
    assert found is not None
    assert (found.rank, found.host, found.kind, found.message, found.is_shown) == (3, "b", Kind.usage, "first", False)


def test_nothing_is_written_without_a_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    supervision = Supervision.of({}, 1)
    supervision.report_failure("error")
    supervision.report_run_directory(tmp_path)
    with supervision.saving():
        assert not list(tmp_path.iterdir())
