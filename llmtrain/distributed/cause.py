"""The cause of a job's failure, found among the ends of its ranks.  Importing this module does not import torch."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.base.invocation import FINISHED, INTERRUPTED, USAGE_ERROR
from llmtrain.distributed.supervision import Failure, Kind, kind_of

LONGEST = 600  # characters of a message


@dataclass(frozen=True)
class RankEnd:
    """The end of a rank's process."""

    rank: int
    host: str
    status: int  # minus the number of a signal
    order: int  # 0 for the first rank that ended
    failure: Failure | None  # its last words
    log: Path | None
    last_lines: tuple[str, ...]  # of its log
    is_by_supervisor: bool = False  # it ended after the supervisor had begun to end all

    @property
    def signal(self) -> int | None:
        """The signal that ended it, also one that it passed on as 128 + N; None: none did."""
        if self.status < 0:
            return -self.status
        return self.status - 128 if self.status - 128 in set(signal.Signals) else None

    @property
    def kind(self) -> Kind:
        """The kind of the failure: as the rank told it, else by the last lines of its output."""
        if self.failure is not None:
            return self.failure.kind
        if self.status == -signal.SIGABRT:  # torch's watchdog, or a thread that was running at exit
            return Kind.consequence
        return kind_of(self.last_lines[-1] if self.last_lines else "", self.status)

    @property
    def message(self) -> str:
        """The last words of the rank, else the last line of its output: one line, without the stack frames of C++."""
        text = self.failure.message if self.failure else "".join(self.last_lines[-1:])
        text = " ".join(text.partition("Exception raised from")[0].split())
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def is_failure(status: int) -> bool:
    """Return whether the others have to end, too."""
    return status not in (FINISHED, INTERRUPTED)


def find_cause(ends: Sequence[RankEnd]) -> RankEnd | None:
    """Find the rank that failed first: of those that a signal ended, else the earliest whose error is its own.

    Errors about closed connections are consequences.  Of several ranks with the same message, the lowest.
    """
    failed = [end for end in ends if is_failure(end.status)]
    by_themselves = [end for end in failed if not end.is_by_supervisor or _spoke_first(end)]
    if not by_themselves:
        return min(failed, key=lambda end: end.order, default=None)
    first = min(by_themselves, key=_precedence)
    same = [end for end in by_themselves if end.message and end.message == first.message and end.kind is first.kind]
    return min([first, *same], key=lambda end: end.rank)


def ranks_to_blame(cause: RankEnd, ends: Sequence[RankEnd]) -> set[int]:
    """Find the ranks that a failure came from: those that the verdict is about, else those that failed by themselves.

    Of several starts a machine to which these belong may be the one that is not well.
    """
    if cause.kind is Kind.verdict:
        failures = [end.failure for end in ends if end.failure is not None and end.message == cause.message]
        return {rank for failure in failures for rank in failure.about if rank < len(ends)}
    by_themselves = [end for end in ends if is_failure(end.status) and not end.is_by_supervisor]
    killed = {end.rank for end in by_themselves if end.status < 0 and end.status != -signal.SIGABRT}
    return killed or {cause.rank, *(end.rank for end in by_themselves if end.kind is Kind.error)}


def only_consequences(ends: Sequence[RankEnd], *, is_whole: bool) -> bool:
    """Return whether the cause is still missing; that of a mistake of the user's is rank 0, which prints it."""
    failed = [end for end in ends if is_failure(end.status)]
    if all(end.status == USAGE_ERROR for end in failed):
        return not is_whole and all(end.rank for end in failed)
    return all(end.status >= 0 or end.status == -signal.SIGABRT for end in failed) and all(
        end.kind is Kind.consequence for end in failed
    )


def _spoke_first(end: RankEnd) -> bool:
    """Return whether a rank that the supervisor ended had failed by itself: it said why."""
    return end.failure is not None and end.failure.kind is not Kind.consequence


def _precedence(end: RankEnd) -> tuple[int, float, int]:
    moment = end.failure.time if end.failure else 0.0
    if end.status < 0 and end.status != -signal.SIGABRT and not end.is_by_supervisor:
        return 0, end.order, end.rank
    kinds = [Kind.verdict, Kind.error, Kind.usage, Kind.consequence]
    rank = kinds.index(end.kind)
    return 1 + (1 if rank == 2 else rank), moment or float(end.order), end.rank


def describe(cause: RankEnd, ends: Sequence[RankEnd], directory: Path | None) -> Iterator[str]:
    """Yield the lines that report the cause: the rank, its host, its end and its last words, and where its log is."""
    shown = any(end.failure is not None and end.failure.is_shown and end.message == cause.message
                for end in ends)  # fmt: skip
    words = "its message is above" if shown else cause.message
    if cause.kind is Kind.verdict:
        if not shown:
            yield f"llmtrain: {words}"
        about = sorted(rank for rank in ranks_to_blame(cause, ends) if len(ends) > rank)
        places = [
            f"rank {end.rank} on {end.host}" for end in ends if end.rank in about and end.host not in cause.message
        ]
        if places:  # one that never sent a heartbeat, or whose machine has another name there
            yield f"llmtrain: started as {', '.join(places)}"
        return
    if cause.status == USAGE_ERROR:
        if not shown and not any(end.rank == 0 and end.status == USAGE_ERROR for end in ends):
            yield f"llmtrain: {words.removeprefix('llmtrain: ')} (rank {cause.rank} on {cause.host})"
        return
    text = f"llmtrain: rank {cause.rank} on {cause.host} {_end_of(cause)}"
    if words and (cause.failure is not None or cause.status > 0):
        text += f": {words.removeprefix('llmtrain: ')}"
    elif cause.last_lines:
        text += f"; the last line of its output: {cause.last_lines[-1].strip()}"
    if len(ends) > 1:
        text += "; the other ranks were ended"
    if directory is not None and cause.log is not None and directory in cause.log.parents:
        text += f"; its log: {cause.log}"
    elif directory is not None:
        text += f"; the run: {directory}"
    yield text
    is_kept = cause.log is not None and directory is not None and directory in cause.log.parents
    if not is_kept and cause.failure is None and len(cause.last_lines) > 1:
        yield from (f"  {line}" for line in cause.last_lines)


def _end_of(cause: RankEnd) -> str:
    if cause.status >= 0:
        return f"failed with exit status {cause.status}"
    try:
        name = signal.Signals(-cause.status).name
    except ValueError:
        name = f"signal {-cause.status}"
    hint = " (the system does so when memory runs out: dmesg shows it)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"
