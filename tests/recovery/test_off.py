"""Steps that are not finite are refused, the third in a row ends the run, and fp16 may search for its scale."""

import json
import math

import pytest
import torch

from llmtrain.recovery import LAG, Failure, Verdict
from llmtrain.recovery.off import FiniteOnly, RecoveryOff

NAN, INF = math.nan, math.inf


def verdict(step: int, loss: float = 3.0, grad_norm: float = 1.0, **more: float) -> Verdict:
    refused = not (math.isfinite(loss) and math.isfinite(grad_norm))
    return Verdict.of(step, 4 * step, 4, {"loss": loss, "grad_norm": grad_norm, "refused": float(refused), **more})


def drive(recovery: FiniteOnly, verdicts: list[Verdict]) -> list[tuple[int, Failure]]:
    acted = []
    for each in verdicts:
        recovery.record(each)
        acted += [(each.step, action) for action in recovery.decide(each.step)]
    return acted


def fresh() -> FiniteOnly:
    return RecoveryOff(examples=0).build(torch.device("cpu"))


@pytest.mark.parametrize(
    ("loss", "norm", "refused"),
    [(3.0, 1.0, 0.0), (1e30, 1e30, 0.0), (NAN, 1.0, 1.0), (3.0, NAN, 1.0), (INF, 1.0, 1.0), (3.0, INF, 1.0),
     (-INF, INF, 1.0)],
)  # fmt: skip
def test_only_nonfinite_steps_are_skipped(loss: float, norm: float, refused: float) -> None:
    judged = fresh().judge(torch.tensor(loss), torch.tensor(norm))
    assert {name: value.item() for name, value in judged.items()} == {"refused": refused, "non_finite": refused}
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in judged.values())


def test_the_third_nonfinite_step_in_a_row_ends_the_run() -> None:
    bad = [verdict(step, loss=NAN if step in (3, 4, 6, 7, 8) else 3.0) for step in range(1, 12)]
    ((step, action),) = drive(fresh(), bad)
    assert step == 8 + LAG
    assert isinstance(action, Failure)
    for part in ("step 8: loss nan and gradient norm 1", "3rd step in a row", "optimizer.lr", "precision=fp32"):
        assert part in action.reason


def test_an_overflow_of_the_scale_is_harmless() -> None:
    overflow = [verdict(step, grad_norm=INF, loss_scale=2.0**16) for step in range(1, 20)]
    assert all(each.refused and each.scaler_overflow for each in overflow)
    assert drive(fresh(), overflow) == []
    at_the_bottom = [verdict(step, grad_norm=INF, loss_scale=1.0) for step in range(1, 6)]
    assert [step for step, _ in drive(fresh(), at_the_bottom)] == [5]
    nan_loss = [verdict(step, loss=NAN, grad_norm=NAN, loss_scale=2.0**16) for step in range(1, 6)]
    assert [step for step, _ in drive(fresh(), nan_loss)] == [5]
    in_between = [verdict(1, loss=NAN), verdict(2, loss=NAN), overflow[2], verdict(4, loss=NAN), verdict(5), verdict(6)]
    assert drive(fresh(), in_between) == []


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_resumed_run_decides_the_same(cut: int) -> None:
    steps = [verdict(step, loss=NAN if step >= 4 else 3.0) for step in range(1, 10)]
    whole = fresh()
    expected = drive(whole, steps)
    first = fresh()
    acted = drive(first, steps[:cut])
    second = fresh()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert acted + drive(second, steps[cut:]) == expected
    assert [step for step, _ in expected] == [8, 9]


def test_the_learning_rate_is_left_unchanged() -> None:
    assert fresh().rate_factor(7) == 1.0


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match="examples=-1: must not be negative"):
        RecoveryOff(examples=-1)
