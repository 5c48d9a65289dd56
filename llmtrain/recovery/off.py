"""No recovery: a step that is not finite never reaches the weights, and the third in a row ends the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.checks import non_negative
from llmtrain.base.stored_files import COUNT, check_kinds
from llmtrain.recovery import Action, Failure, RecoveryConfig, Verdict
from llmtrain.recovery.delayed import DelayedRecovery

MAX_REFUSED_IN_A_ROW = 3


@dataclass(frozen=True)
class RecoveryOff(RecoveryConfig):
    """Settings of ``recovery=off``: only steps that are not finite are refused; spikes are trained on."""

    examples: int

    def __post_init__(self) -> None:
        non_negative(examples=self.examples)

    def build(self, device: torch.device, *, judges_spikes: bool = True) -> "FiniteOnly":
        return FiniteOnly()


class FiniteOnly(DelayedRecovery):
    """A recovery that refuses steps that are not finite, and fails the run at the third in a row.

    Under fp16 an overflow with a finite loss only means that the loss scale is still too large; it does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused_in_a_row = 0

    def judge(self, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
        non_finite = (~(loss.isfinite() & norm.isfinite())).float()
        return {"refused": non_finite, "non_finite": non_finite}

    def consider(self, verdict: Verdict, step: int) -> list[Action]:
        if verdict.finite or verdict.scaler_overflow:
            self.refused_in_a_row = 0
            return []
        self.refused_in_a_row += 1
        if self.refused_in_a_row < MAX_REFUSED_IN_A_ROW:
            return []
        return [
            Failure(
                f"step {verdict.step}: loss {verdict.loss:g} and gradient norm {verdict.grad_norm:g}, the "
                f"{MAX_REFUSED_IN_A_ROW}rd step in a row that is not finite. None of them reached the weights. "
                "Usual remedies: a lower optimizer.lr, a longer schedule.warmup_steps, clipping=norm, "
                "precision=fp32, recovery=on."
            )
        ]

    def rolled_back(self, to_step: int | None, stored: Mapping[str, Any] | None) -> list[Action]:
        raise AssertionError("recovery=off never rolls back")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"refused_in_a_row": self.refused_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        check_kinds(state, {"refused_in_a_row": COUNT}, "recovery")
        self.refused_in_a_row = state.get("refused_in_a_row", 0)
