"""Names of the phases that a rank can be in, in their order within a step, and judgement of ranks that are behind.

Importing this module does not import torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from llmtrain.base.format import duration

NAMED = 4  # ranks that a message names


class Phase(Enum):
    """A phase of a rank's work; the text follows "rank 3 has been ..."."""

    start = "starting"
    prepare = "preparing data"
    build = "building the model"
    load = "loading a checkpoint"
    compile = "compiling"
    data = "in the data loader"
    compute = "in forward and backward"
    reduce = "in all_reduce"
    update = "updating the weights"
    evaluate = "evaluating"
    sample = "sampling text"
    save = "saving a checkpoint"
    agree = "agreeing with the other ranks"
    barrier = "waiting for the other ranks"
    end = "at the end of the run"
    left = "gone"

    @property
    def waits(self) -> bool:
        """True where a rank does nothing but wait for the others."""
        return self in (Phase.reduce, Phase.agree, Phase.barrier, Phase.end)


Key = tuple[int, bool, int]  # progress: step, waits, order of the phase
ORDER = {phase: order for order, phase in enumerate(Phase)}


@dataclass(frozen=True)
class Position:
    """A rank's place, as another rank knows it."""

    rank: int
    host: str  # "" before its first heartbeat
    phase: Phase
    step: int
    seconds: float  # that it has been there, by its last heartbeat
    silence: float = 0.0  # seconds since its last heartbeat
    writing: float = 0.0  # seconds that a thread has been writing its files of a checkpoint; 0: it does not
    collectives: int = 0  # operations with all ranks that it has begun

    @property
    def key(self) -> Key:
        """Order of progress; within a step a rank that waits has done the work of all phases that do not."""
        return self.step, self.phase.waits, ORDER[self.phase]


@dataclass(frozen=True)
class Verdict:
    """A finding about ranks that hold the others up."""

    text: str
    ranks: tuple[int, ...]  # those it is about
    is_silence: bool = False

    @property
    def topic(self) -> tuple[bool, tuple[int, ...]]:
        """The same for the same finding later on."""
        return self.is_silence, self.ranks


def judge(positions: Sequence[Position], limit: float, behind_seconds: float = math.inf) -> Verdict | None:
    """Find the ranks that have been silent, or behind the others without progress, for longer than ``limit`` seconds.

    ``behind_seconds``: since others were first seen ahead of the last ones; a heartbeat is up to a second old, so that
    a rank may seem to be where all of them were for long.

    A rank is behind at a lower step, or at the same step in an earlier phase.  Where all ranks are in one place for so
    long, :func:`find_late` tells them apart; if it cannot, all are named: a network link, a device or a file system
    does not answer.
    """
    silence = find_silence(positions, limit)
    if silence is not None:
        return silence
    present = [each for each in positions if each.phase is not Phase.left]
    if not present:
        return None
    least = min(each.key for each in present)
    behind = [each for each in present if each.key == least]
    seconds = min(each.seconds for each in behind)
    if seconds <= limit:
        return None
    place = f"{behind[0].phase.value} at step {behind[0].step:,}"
    if len(behind) == len(present) and (found := find_late(present, limit)) is not None:
        return found
    if len(behind) == len(present):
        text = f"all {len(present)} ranks have been {place} for {_seconds(seconds)}, and none is behind the others"
        if behind[0].phase.waits:
            text += ": a network link or a device may not answer"
        return Verdict(text, tuple(each.rank for each in behind))
    if behind_seconds <= limit:
        return None
    has = "has" if len(behind) == 1 else "have"
    text = f"{_named(behind)} {has} been {place} for {_seconds(seconds)}"
    return Verdict(text + _others(present, behind), tuple(each.rank for each in behind))


def find_late(positions: Sequence[Position], limit: float) -> Verdict | None:
    """Find, among ranks in one place, those that the others wait for.

    They have been writing their files of a checkpoint for longer than ``limit`` seconds, and others do not; or they
    have begun fewer collective operations, in which the others are.
    """
    late = [each for each in positions if each.writing > limit]
    if late:
        text = f"been writing a checkpoint for {_seconds(max(each.writing for each in late))}"
    else:
        most = max(each.collectives for each in positions)
        late = [each for each in positions if each.collectives < most]
        seconds = _seconds(min(each.seconds for each in positions))
        text = f"not begun an operation that the others wait in, {positions[0].phase.value} for {seconds}"
    if not 0 < len(late) < len(positions):
        return None
    has = "has" if len(late) == 1 else "have"
    return Verdict(f"{_named(late)} {has} {text}" + _others(positions, late), tuple(each.rank for each in late))


def last_key(positions: Sequence[Position]) -> Key | None:
    """The progress of the last ranks, if others are ahead of them; None: nobody is."""
    keys = {each.key for each in positions if each.phase is not Phase.left}
    return min(keys) if len(keys) > 1 else None


def find_silence(positions: Sequence[Position], limit: float) -> Verdict | None:
    """Find the ranks without a heartbeat for longer than ``limit`` seconds: stopped, or blocked as a whole."""
    present = [each for each in positions if each.phase is not Phase.left]
    silent = [each for each in present if each.silence > limit]
    if not silent:
        return None
    seconds = max(each.silence for each in silent)
    text = f"no heartbeat from {_named(silent)} for {_seconds(seconds)}, last {_places(silent)}"
    return Verdict(text + _others(present, silent), tuple(each.rank for each in silent), is_silence=True)


def _seconds(seconds: float) -> str:
    return f"{round(seconds)} s" if seconds < 120 else duration(seconds)


def _named(positions: Sequence[Position]) -> str:
    """Name ranks with their hosts: ``rank 3 on host b``."""
    names = [f"rank {each.rank} " + (f"on host {each.host}" if each.host else "(which has sent none)")
             for each in positions[:NAMED]]  # fmt: skip
    if len(positions) > NAMED:
        names.append(f"{len(positions) - NAMED} more")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _places(positions: Iterable[Position]) -> str:
    """List the places of ranks, each once."""
    places = dict.fromkeys(f"{each.phase.value} at step {each.step:,}" for each in positions)
    return ", ".join(list(places)[:NAMED])


def _others(present: Sequence[Position], named: Sequence[Position]) -> str:
    """List the places of the ranks that are not named: "; 7 ranks wait in all_reduce at step 1,517"."""
    groups: dict[tuple[Phase, int], int] = {}
    for each in present:
        if each not in named:
            groups[each.phase, each.step] = groups.get((each.phase, each.step), 0) + 1
    texts = []
    for (phase, step), number in sorted(groups.items(), key=lambda group: -group[1])[:NAMED]:
        noun = "rank" if number == 1 else "ranks"
        verb = ("waits" if number == 1 else "wait") if phase is Phase.reduce else ("is" if number == 1 else "are")
        texts.append(f"{number} {noun} {verb} {phase.value} at step {step:,}")
    return f"; {', '.join(texts)}" if texts else ""
