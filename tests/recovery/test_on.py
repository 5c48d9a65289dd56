"""The ladder of recovery, rung by rung, and with each rung switched off."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from llmtrain.recovery import LAG, Action, Failure, RateReduction, Rollback, Skip, Verdict
from llmtrain.recovery.on import Ladder, RecoveryOn

NAN, INF = math.nan, math.inf
BATCH = 4
QUIET, SPIKE = (3.0, 1.0), (9.0, 1.0)

VALUES = yaml.safe_load((Path(__file__).parents[2] / "conf" / "recovery" / "on.yaml").read_text())
SHIPPED = RecoveryOn(**{key: value for key, value in VALUES.items() if key != "_target_"})
SHORT = replace(SHIPPED, max_skips=1, rollback_after=8, max_refused=30)  # few steps from rung to rung


def ladder(config: RecoveryOn = SHORT, **changes: float) -> Ladder:
    return replace(config, **changes).build(torch.device("cpu"))


class Driver:
    """A run without a model: judges, notes and decides as the loop does, ``late`` steps after the launch."""

    def __init__(self, recovery: Ladder, *, late: int = 0, checkpoints: Iterable[int] = ()) -> None:
        self.recovery, self.late = recovery, late
        self.step = self.position = 0
        self.under_way: list[Verdict] = []
        self.acted: list[tuple[int, Action]] = []
        self.refused: list[int] = []
        self.factors: list[float] = []
        self.stored: dict[int, str] = {}
        self.keep = set(checkpoints)

    def run(self, steps: Iterable[tuple[float, float]], batch_size: int = BATCH, **more: float) -> "Driver":
        for loss, norm in steps:
            self.factors.append(self.recovery.rate_factor(self.step))
            judged = self.recovery.judge(torch.tensor(loss), torch.tensor(norm))
            values = {name: value.item() for name, value in judged.items()}
            self.step += 1
            values |= {"loss": loss, "grad_norm": norm, **more}
            self.under_way.append(Verdict.of(self.step, self.position, batch_size, values))
            self.position += batch_size
            if values["refused"]:
                self.refused.append(self.step)
            self.note(self.late)
            before = self.step
            self.act(self.recovery.decide(self.step))
            if self.step == before and self.step in self.keep:
                self.note(0)
                self.stored[self.step] = json.dumps(self.recovery.state_dict(), allow_nan=False)
        return self

    def note(self, late: int) -> None:
        while len(self.under_way) > late:
            self.recovery.record(self.under_way.pop(0))

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            self.acted.append((self.step, action))
            if isinstance(action, Rollback):
                old = [step for step in self.stored if step <= action.before_step]
                self.note(0)
                if old:
                    self.step = max(old)
                    self.act(self.recovery.rolled_back(self.step, json.loads(self.stored[self.step])))
                else:
                    self.act(self.recovery.rolled_back(None, None))

    def kinds(self) -> list[tuple[int, type]]:
        return [(step, type(action)) for step, action in self.acted]


def quiet(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """Steps of a run that has settled."""
    chance = np.random.default_rng(seed)
    return list(zip(chance.normal(3.0, 0.05, steps).tolist(), chance.lognormal(0, 0.3, steps).tolist(), strict=True))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_noisy_curve_that_falls_skips_no_step(seed: int) -> None:
    chance = np.random.default_rng(seed)
    step = np.arange(1200)
    losses = 2.5 + 8 * np.exp(-step / 60) + 0.15 * chance.standard_t(6, len(step))
    norms = (0.3 + 5 * np.exp(-step / 20)) * chance.lognormal(0, 0.5, len(step))
    driver = Driver(ladder()).run(zip(losses.tolist(), norms.tolist(), strict=True))
    assert driver.refused == []
    assert driver.acted == []


def test_a_plateau_and_a_slow_rise_skip_no_step() -> None:
    chance = np.random.default_rng(9)
    losses = np.concatenate([np.linspace(11, 6, 50), np.full(300, 6.0), np.linspace(6, 12, 1500)])
    losses += 0.02 * chance.normal(size=len(losses))
    assert Driver(ladder()).run((loss, 1.0) for loss in losses.tolist()).refused == []


@pytest.mark.parametrize(
    ("step", "refused"),
    [((9.0, 1.0), True), ((3.0, 100.0), True), ((3.4, 1.0), False), ((3.0, 4.0), False), ((0.1, 0.01), False),
     ((NAN, 1.0), True), ((3.0, NAN), True), ((INF, 1.0), True), ((-INF, 1.0), True), ((3.0, INF), True)],
)  # fmt: skip
def test_one_bad_step_is_skipped_and_nothing_else_happens(step: tuple[float, float], refused: bool) -> None:
    driver = Driver(ladder()).run(quiet(60))
    before = driver.recovery.window.state_dict()
    driver.run([step])
    assert driver.refused == ([61] if refused else [])
    assert (driver.recovery.window.state_dict() == before) == refused
    driver.run(quiet(20, seed=1))
    assert driver.acted == []
    assert driver.refused == ([61] if refused else [])


def test_spikes_are_not_judged_at_first_but_nan_is() -> None:
    driver = Driver(ladder()).run([*quiet(20), SPIKE, (NAN, 1.0)])
    assert driver.refused == [22]


def test_judge_reports_limits_and_reasons() -> None:
    recovery = ladder()
    Driver(recovery).run([QUIET] * 32)
    spike = recovery.judge(torch.tensor(9.0), torch.tensor(0.5))
    assert {name: value.item() for name, value in spike.items()} == pytest.approx(
        {"refused": 1.0, "non_finite": 0.0, "loss_limit": 3.72, "grad_norm_limit": 11.0}
    )
    assert recovery.judge(torch.tensor(9.0), torch.tensor(NAN))["non_finite"].item() == 1.0
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in spike.values())
    values = {name: value.item() for name, value in spike.items()} | {"loss": 9.0, "grad_norm": 20.0}
    verdict = Verdict.of(33, 128, BATCH, values)
    assert verdict.reason == "loss 9 (limit 3.72) and gradient norm 20 (limit 11)"
    assert Verdict.of(1, 0, 1, {"loss": NAN, "grad_norm": 2.0, "refused": 1.0}).reason == (
        "loss nan and gradient norm 2, not finite"
    )
    assert Verdict.of(1, 0, 1, {"loss": 2.0, "grad_norm": 2.0, "refused": 0.0}).reason == ""


@pytest.mark.parametrize("key", ["loss_deviations", "grad_norm_deviations"])
def test_a_quantity_may_be_left_unjudged(key: str) -> None:
    driver = Driver(ladder(**{key: 0.0})).run([*quiet(60), (9.0, 1.0), (3.0, 100.0), (NAN, 1.0)])
    assert driver.refused == ([62, 63] if key == "loss_deviations" else [61, 63])


# --- the rungs -------------------------------------------------------------------------------------------------------


def test_data_are_skipped_once_an_episode() -> None:
    driver = Driver(ladder()).run([*quiet(60), *[SPIKE] * 5, *quiet(29), *[SPIKE] * 2, *quiet(30), *[SPIKE] * 2])
    assert driver.acted == [(64, Skip(10))]  # after 29 calm steps it is the same episode, after 30 it is not
    driver.run(quiet(2))
    assert driver.acted == [(64, Skip(10)), (130, Skip(10))]


def test_more_data_are_skipped_while_steps_stay_bad() -> None:
    """Steps launched before the data was left do not count towards the next time."""
    driver = Driver(ladder(SHIPPED), checkpoints=[50]).run([*quiet(160), *[SPIKE] * 24])
    assert driver.acted == [
        (164, Skip(10)), (168, Skip(20)), (172, Skip(40)), (176, Skip(80)), (182, Rollback(61, 200)),
    ]  # fmt: skip
    enough = Driver(ladder(SHIPPED)).run([*quiet(160), *[SPIKE] * 6, *quiet(60), *[SPIKE] * 2, *quiet(2)])
    assert enough.acted == [(164, Skip(10)), (168, Skip(20)), (230, Skip(10))]


def test_calm_steps_are_counted_in_a_row() -> None:
    driver = Driver(ladder(skip_after=4)).run([*quiet(60), *[*quiet(20), SPIKE] * 4, *quiet(2)])
    assert driver.kinds() == [(146, Skip)]
    driver = Driver(ladder(skip_after=4)).run([*quiet(60), *[*quiet(30), SPIKE] * 4, *quiet(2)])
    assert driver.acted == []


@pytest.mark.parametrize("late", [0, 1, LAG])
def test_the_steps_of_recovery_do_not_depend_on_the_delay_of_readback(late: int) -> None:
    steps = [*quiet(250), *[SPIKE] * 10, *quiet(100), *[SPIKE] * 10, *quiet(3)]
    driver = Driver(ladder(), late=late, checkpoints=[100, 200]).run(steps)
    assert driver.acted == [
        (252 + LAG, Skip(10)),
        (258 + LAG, Rollback(before_step=151, batches=200)),  # to 100, and on to 200
        (202 + LAG, Skip(10)),
        (208 + LAG, Rollback(before_step=101, batches=200)),
        (100, RateReduction(0.5, 500)),
    ]
    assert driver.factors[-4:] == [1.0, 0.5, 0.5, 0.5]
    assert driver.step == 103


def test_a_rollback_restores_the_window_of_its_checkpoint() -> None:
    driver = Driver(ladder(), checkpoints=[100]).run([*quiet(100), *[(3.0 + 0.01 * i, 1.0) for i in range(200)]])
    assert driver.refused == []
    assert driver.recovery.window.limits()[0].item() > 8
    driver.run([(50.0, 1.0)] * 10)
    assert driver.kinds() == [(304, Skip), (310, Rollback)]
    assert driver.step == 100
    stored = json.loads(driver.stored[100])
    assert driver.recovery.window.state_dict() == stored["window"]
    assert driver.recovery.state_dict()["pending"] == []  # those of the checkpoint have been decided upon long since
    assert driver.recovery.state_dict()["tried"]["rollbacks"] == 1
    driver.run([(5.0, 1.0)])
    assert driver.refused[-1] == 101


def test_a_rollback_to_a_checkpoint_without_a_window_starts_a_new_one() -> None:
    driver = Driver(ladder(), checkpoints=[50]).run(quiet(50))
    driver.stored[50] = "null"
    driver.run([*quiet(110), *[SPIKE] * 10])
    assert driver.kinds()[-1] == (170, Rollback)
    assert driver.recovery.window.state_dict() == {"loss": [], "grad_norm": []}


def test_before_step_is_never_negative() -> None:
    driver = Driver(ladder(), checkpoints=[]).run([*quiet(40), *[SPIKE] * 10])
    assert driver.acted[1] == (50, Rollback(before_step=0, batches=200))


def test_after_max_rollbacks_it_gives_up_and_says_why() -> None:
    driver = Driver(ladder(rollback_steps=0), checkpoints=[50]).run([*quiet(90), *[SPIKE] * 40])
    assert [kind for _, kind in driver.kinds()] == [
        Skip, Rollback, Skip, Rollback, RateReduction, Skip, Rollback, RateReduction, Skip, Failure,
    ]  # fmt: skip
    assert driver.acted[-3][1] == RateReduction(0.25, 500)
    assert driver.recovery.rate_factor(549) == 0.25
    assert driver.recovery.rate_factor(550) == 1.0
    reason = driver.acted[-1][1].reason
    for part in (
        "step 58: loss 9 (limit ", "8 steps refused since step 51, none of which reached the weights",
        "skipped data 4 times", "rolled back to a checkpoint 3 times", "lowered the learning rate twice",
        "optimizer.lr", "schedule.warmup_steps",
        "clipping.max_norm", "precision=fp32", "recovery=off", "recovery.loss_deviations", "positions 480 to 511",
    ):  # fmt: skip
        assert part in reason


def test_without_a_checkpoint_the_rate_is_lowered_and_the_new_level_accepted() -> None:
    driver = Driver(ladder()).run([*quiet(60), *[SPIKE] * 90])
    assert driver.acted == [(64, Skip(10)), (70, Rollback(0, 200)), (70, RateReduction(0.5, 500))]
    assert driver.refused == list(range(61, 71))
    assert driver.factors[69:71] == [1.0, 0.5]
    assert driver.recovery.rate_factor(569) == 0.5
    assert driver.recovery.rate_factor(570) == 1.0


def test_data_skipped_before_a_rollback_count_again() -> None:
    driver = Driver(ladder(rollback_steps=5), checkpoints=[60]).run([*quiet(60), *[SPIKE] * 60])
    assert driver.kinds() == [(64, Skip), (70, Rollback), (70, RateReduction)]  # 60 is not old enough for 61
    driver.run([(90.0, 1.0)] * 10)
    assert driver.step == 60
    driver.run([SPIKE] * 4)
    assert driver.kinds()[-1] == (64, Skip)


def test_without_a_checkpoint_twice_it_gives_up() -> None:
    driver = Driver(ladder()).run([*quiet(60), *[SPIKE] * 60, *[(90.0, 1.0)] * 10])
    assert [kind for _, kind in driver.kinds()] == [Skip, Rollback, RateReduction, Skip, Rollback, Failure]
    assert "found no checkpoint old enough twice" in driver.acted[-1][1].reason


def test_a_lower_rate_is_no_help_where_no_update_gets_through() -> None:
    driver = Driver(ladder()).run([(NAN, NAN)] * 10)
    assert driver.kinds() == [(4, Skip), (10, Rollback), (10, Failure)]
    assert "step 8: loss nan and gradient norm nan, not finite; 8 steps refused" in driver.acted[-1][1].reason
    assert "recovery=off" not in driver.acted[-1][1].reason
    mixed = Driver(ladder()).run([(NAN, NAN), QUIET] * 10)
    assert [kind for _, kind in mixed.kinds()] == [Skip, Rollback, RateReduction]


def test_rollbacks_are_forgotten_once_the_run_is_past_the_place() -> None:
    affair = [*[SPIKE] * 10, *quiet(1200)]
    driver = Driver(ladder(rollback_steps=10), checkpoints=range(100, 9000, 100)).run([*quiet(205), *affair * 5])
    assert [kind for _, kind in driver.kinds()] == [Skip, Rollback] * 5
    strict = ladder(rollback_steps=10, forget_steps=0)
    driver = Driver(strict, checkpoints=range(100, 9000, 100)).run([*quiet(205), *affair * 4])
    assert driver.kinds()[-1][1] is Failure


@pytest.mark.parametrize(
    ("off", "expected"),
    [
        ({"skip_after": 0}, [Rollback, Rollback, RateReduction, Rollback, RateReduction, Failure]),
        ({"lower_rate_at": 0}, [Skip, Rollback, Skip, Rollback, Skip, Rollback, Skip, Failure]),
        ({"rollback_after": 0}, [Skip, RateReduction]),  # which takes the new level, so nothing more is refused
        ({"rollback_after": 0, "lower_rate_at": 0}, [Skip, Failure]),
        ({"rollback_after": 0, "lower_rate_at": 0, "skip_after": 0, "max_refused": 5}, [Failure]),
        ({"max_rollbacks": 1}, [Skip, Rollback, Skip, Failure]),
        ({"lower_rate_at": 1, "max_rollbacks": 1}, [Skip, Rollback, RateReduction, Skip, Failure]),
        ({"loss_deviations": 0.0}, []),
    ],
)
def test_each_measure_can_be_switched_off(off: dict[str, float], expected: list[type]) -> None:
    driver = Driver(ladder(rollback_steps=0, **off), checkpoints=[50]).run(quiet(90))
    for _ in range(70):
        if Failure not in [kind for _, kind in driver.kinds()]:
            driver.run([SPIKE])
    assert [kind for _, kind in driver.kinds()] == expected


def test_an_overflow_of_the_scale_is_no_spike() -> None:
    driver = Driver(ladder()).run([*quiet(60)], loss_scale=2.0**16).run([(3.0, INF)] * 20, loss_scale=2.0**16)
    assert driver.refused == list(range(61, 81))
    assert driver.acted == []
    driver.run([(3.0, INF)] * 4, loss_scale=1.0)
    assert driver.kinds() == [(84, Skip)]


def test_another_batch_size_starts_a_new_window() -> None:
    large, small = [(3.0, 1.0)] * 60, [(4.0, 1.0), (4.5, 1.0), (4.0, 1.0), (1.5, 1.0)] * 40
    driver = Driver(ladder()).run(large, batch_size=64).run(small, batch_size=2)
    assert driver.refused == [61, 62, 63]  # before it was known
    assert driver.acted == []
    resumed = Driver(ladder())
    resumed.recovery.load_state_dict(Driver(ladder()).run(large, batch_size=64).recovery.state_dict())
    resumed.step = 60
    resumed.run(small, batch_size=2)
    assert (resumed.refused, resumed.acted) == (driver.refused, [])
    same_size = Driver(ladder()).run(large, batch_size=64).run(small, batch_size=64)
    assert [kind for _, kind in same_size.kinds()] == [Skip, Rollback, RateReduction]


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_resumed_at_any_step_decides_the_same() -> None:
    """Also in the middle of an episode, and with steps that have not been decided upon."""
    steps = [*quiet(60), *[SPIKE] * 5, *quiet(10), (NAN, 1.0), *[SPIKE] * 3, *[(12.0, 1.0)] * 60, *[(90.0, NAN)] * 5]
    whole = Driver(ladder()).run(steps)
    assert [kind for _, kind in whole.kinds()] == [Skip, Rollback, RateReduction, Skip]
    for cut in range(40, len(steps)):
        first = Driver(ladder()).run(steps[:cut])
        state = json.loads(json.dumps(first.recovery.state_dict(), allow_nan=False))
        second = Driver(ladder())
        second.recovery.load_state_dict(state)
        second.step, second.position = first.step, first.position
        second.run(steps[cut:])
        assert first.acted + second.acted == whole.acted, cut
        assert first.refused + second.refused == whole.refused, cut
        assert first.factors + second.factors == whole.factors, cut
        assert second.recovery.state_dict() == whole.recovery.state_dict(), cut


def test_the_state_of_another_option_starts_anew() -> None:
    recovery = ladder()
    recovery.load_state_dict({})
    recovery.load_state_dict({"pending": [], "refused_in_a_row": 2})
    assert recovery.state_dict() == ladder().state_dict()


# --- the values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_steps": 0}, "window_steps=0: must be positive"),
        ({"calm_steps": 0}, "calm_steps=0: must be positive"),
        ({"skip_after": -1}, "skip_after=-1: must not be negative"),
        ({"loss_deviations": NAN}, "loss_deviations=nan: must not be negative"),
        ({"lower_rate_factor": 0.0}, "lower_rate_factor=0.0: must be positive"),
        ({"lower_rate_factor": 2.0}, "lower_rate_factor=2.0: must lie between 0 and 1"),
        ({"min_window_steps": 200}, "min_window_steps=200: never reached, the window holds window_steps=128"),
        ({"skip_after": 8}, "skip_after=8: not reached before rollback_after=8"),
        ({"max_refused": 8}, "max_refused=8: reached before"),
        ({"max_refused": 2, "rollback_after": 0}, "max_refused=2: reached before"),
        ({"examples": -1}, "examples=-1: must not be negative"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(SHORT, **changes)


@pytest.mark.gpu
def test_judging_on_a_gpu_gives_the_same_without_waiting() -> None:
    steps = [*quiet(200), SPIKE, (NAN, 1.0), *quiet(3)]
    here, there = ladder(), SHIPPED.build(torch.device("cuda"))
    losses, norms = (torch.tensor(values, device="cuda") for values in zip(*steps, strict=True))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        judged = [there.judge(loss, norm) for loss, norm in zip(losses.unbind(), norms.unbind(), strict=True)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (loss, norm), on_gpu in zip(steps, judged, strict=True):
        on_cpu = here.judge(torch.tensor(loss), torch.tensor(norm))
        assert {n: v.item() for n, v in on_gpu.items()} == pytest.approx({n: v.item() for n, v in on_cpu.items()})
    assert here.window.state_dict() == there.window.state_dict()
