"""The shared part of every option: a queue of recorded steps that wait for their decision."""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmtrain.base.stored_files import OBJECTS, build_typed, check_kinds, refuse
from llmtrain.recovery import LAG, Action, Failure, Recovery, Rollback, Verdict


class DelayedRecovery(Recovery):
    """A recovery whose rule is :meth:`consider`, called for each step ``LAG`` steps after its launch, in order."""

    def __init__(self) -> None:
        self.pending: deque[Verdict] = deque()
        self.newest: int | None = None  # the last step recorded

    @abstractmethod
    def consider(self, verdict: Verdict, step: int) -> list[Action]:
        """The actions for the step of ``verdict``, now that ``step`` has been launched."""

    def record(self, verdict: Verdict) -> None:
        assert self.newest is None or verdict.step == self.newest + 1, (verdict.step, self.newest)
        self.pending.append(verdict)
        self.newest = verdict.step

    def decide(self, step: int) -> list[Action]:
        assert self.newest is None or self.newest >= step - LAG, "the readback is behind"
        actions: list[Action] = []
        while self.pending and self.pending[0].step <= step - LAG:
            actions += self.consider(self.pending.popleft(), step)
            if any(isinstance(action, Rollback | Failure) for action in actions):
                break  # the steps after it are undone, or never decided
        return actions

    def forget_pending(self) -> None:
        """Drop the pending steps: they have been undone."""
        self.pending.clear()
        self.newest = None

    def state_dict(self) -> dict[str, Any]:
        return {"pending": [{key: _encode(value) for key, value in asdict(v).items()} for v in self.pending]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.forget_pending()
        check_kinds(state, {"pending": OBJECTS}, "recovery")
        for row in state.get("pending", []):
            verdict = build_typed(Verdict, {key: _decode(value) for key, value in row.items()}, "recovery.pending")
            if self.newest is not None and verdict.step != self.newest + 1:
                refuse("recovery.pending", f"step {verdict.step} follows step {self.newest}")
            self.record(verdict)


def _encode(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON lacks, by "nan", "inf" and "-inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
