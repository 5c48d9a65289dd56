"""Every schedule against literal values of its formula, and against torch where torch has the same one."""

import math

import pytest
import torch

from llmtrain.schedule.constant import Constant
from llmtrain.schedule.exponential import Exponential
from llmtrain.schedule.inverse_sqrt import InverseSqrt
from llmtrain.schedule.linear_warmup_cosine_lr import LinearWarmupCosineLR
from llmtrain.schedule.step import StepDecay
from llmtrain.schedule.warmup_cosine import WarmupCosine
from llmtrain.schedule.warmup_linear import WarmupLinear
from llmtrain.schedule.wsd import WSD, Shape
from tests.helpers.options import make_option, option_names

WARMUP = {"initial_lr": 1e-5, "warmup_steps": 27, "warmup_ratio": 0.0}
NO_WARMUP = {"initial_lr": 0.0, "warmup_steps": None, "warmup_ratio": 0.0}
DECAY = {"decay_steps": 40, "decay_ratio": 0.0, "min_lr": 1e-5}
LAVIS = {"init_lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 20, "epochs": None}

# peak 1e-3, 135 steps; 4.866667e-4 at step 13 is the common warm-up, 1e-5 + 13 * 9.9e-4 / 27
LITERAL = {
    "warmup_cosine": (
        WarmupCosine(**WARMUP, min_lr=1e-5),
        {0: 1e-5, 13: 4.866667e-4, 27: 1e-3, 81: 5.05e-4, 134: 1.020941e-5},
    ),
    "warmup_linear": (
        WarmupLinear(**WARMUP, min_lr=1e-5),
        {0: 1e-5, 13: 4.866667e-4, 27: 1e-3, 54: 7.525e-4, 81: 5.05e-4, 134: 1.916667e-5},
    ),
    "wsd linear": (
        WSD(**WARMUP, **DECAY, decay_shape=Shape.linear),
        {13: 4.866667e-4, 27: 1e-3, 95: 1e-3, 105: 7.525e-4, 115: 5.05e-4, 134: 3.475e-5},
    ),
    "wsd cosine": (
        WSD(**WARMUP, **DECAY, decay_shape=Shape.cosine),
        {94: 1e-3, 95: 1e-3, 105: 8.550179e-4, 115: 5.05e-4, 134: 1.152592e-5},
    ),
    "wsd sqrt": (
        WSD(**WARMUP, **DECAY, decay_shape=Shape.sqrt),
        {94: 1e-3, 95: 1e-3, 105: 5.05e-4, 115: 2.999643e-4, 134: 2.245331e-5},
    ),
    "constant": (Constant(**NO_WARMUP), {0: 1e-3, 1: 1e-3, 134: 1e-3}),
    "constant after warm-up": (Constant(**WARMUP), {0: 1e-5, 13: 4.866667e-4, 27: 1e-3, 134: 1e-3}),
    "inverse_sqrt": (InverseSqrt(**WARMUP), {13: 4.866667e-4, 27: 1e-3, 108: 5e-4, 134: 4.488792e-4}),
    "inverse_sqrt without warm-up": (InverseSqrt(**NO_WARMUP), {0: 1e-3, 1: 1e-3, 4: 5e-4, 100: 1e-4}),
    "step at milestones": (
        StepDecay(**WARMUP, milestones=[50, 100], every=None, factor=0.1),
        {13: 4.866667e-4, 27: 1e-3, 49: 1e-3, 50: 1e-4, 99: 1e-4, 100: 1e-5, 134: 1e-5},
    ),
    "step every 30": (
        StepDecay(**NO_WARMUP, milestones=[], every=30, factor=0.5),
        {0: 1e-3, 29: 1e-3, 30: 5e-4, 60: 2.5e-4, 134: 6.25e-5},
    ),
    "exponential by rate": (
        Exponential(**WARMUP, decay_rate=0.5, decay_steps=20, min_lr=5e-5),
        {13: 4.866667e-4, 27: 1e-3, 47: 5e-4, 57: 3.535534e-4, 67: 2.5e-4, 134: 5e-5},
    ),
    "exponential to min_lr": (
        Exponential(**WARMUP, decay_rate=None, decay_steps=None, min_lr=1e-5),
        {13: 4.866667e-4, 27: 1e-3, 81: 1e-4, 134: 1.043562e-5},
    ),
    "lavis": (
        LinearWarmupCosineLR(**LAVIS, lr_decay_rate=1.0),
        {0: 1e-6, 10: 5.005e-4, 19: 9.5005e-4, 20: 9.473482e-4, 45: 7.525e-4, 90: 2.575e-4, 134: 1.013403e-5},
    ),
    "lavis with decay": (
        LinearWarmupCosineLR(**LAVIS, lr_decay_rate=0.125),
        {10: 5.005e-4, 45: 3.8125e-4, 90: 7.1875e-5},
    ),
}


def test_every_schedule_has_literal_values():
    assert {type(schedule) for schedule, _ in LITERAL.values()} == {
        type(make_option("schedule", name, {"lr": 1e-3})) for name in option_names("schedule")
    }


@pytest.mark.parametrize("case", LITERAL)
def test_schedules_have_their_literal_values(case):
    schedule, expected = LITERAL[case]
    assert {step: schedule(step, peak=1e-3, total=135) for step in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", LITERAL)
@pytest.mark.parametrize("total", [1, 2, 10, 28, 135])
def test_schedules_are_pure_functions_of_the_step(case, total):
    schedule, _ = LITERAL[case]
    rates = [schedule(step, peak=1e-3, total=total) for step in range(total)]
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert [schedule(step, peak=1e-3, total=total) for step in reversed(range(total))] == rates[::-1]
    assert schedule(total, peak=1e-3, total=total) == schedule(total + 1000, peak=1e-3, total=total) == rates[-1]


def torch_rates(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (
            WarmupCosine(**NO_WARMUP, min_lr=1e-5),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=60, eta_min=1e-5),
        ),
        (
            WarmupLinear(**NO_WARMUP, min_lr=1e-4),
            lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1, end_factor=0.1, total_iters=60),
        ),
        (
            Exponential(**NO_WARMUP, decay_rate=0.97, decay_steps=1, min_lr=0.0),
            lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.97),
        ),
        (
            StepDecay(**NO_WARMUP, milestones=[], every=7, factor=0.3),
            lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=7, gamma=0.3),
        ),
        (
            StepDecay(**NO_WARMUP, milestones=[3, 30], every=None, factor=0.3),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[3, 30], gamma=0.3),
        ),
        (
            LinearWarmupCosineLR(
                init_lr=1e-3, min_lr=1e-5, warmup_lr=0.0, warmup_steps=0, lr_decay_rate=1.0, epochs=None
            ),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=60, eta_min=1e-5),
        ),
    ],
)
def test_schedules_equal_torchs(schedule, reference):
    ours = [schedule(step, peak=1e-3, total=60) for step in range(60)]
    assert ours == pytest.approx(torch_rates(reference, 60), rel=1e-9)


def lavis_rates(epochs: int, steps: int, warmup_steps: int) -> list[float]:
    """``LinearWarmupCosineLRScheduler.step(cur_epoch, cur_step)`` of ``lavis/common/optims.py``, in other words."""
    low, peak, start = LAVIS["min_lr"], LAVIS["init_lr"], LAVIS["warmup_lr"]
    rates = [min(peak, start + (peak - start) * step / max(warmup_steps, 1)) for step in range(steps)]
    for epoch in range(1, epochs):
        rates += steps * [(peak - low) * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) + low]
    return rates


@pytest.mark.parametrize(("epochs", "steps", "warmup_steps"), [(6, 17, 5), (6, 17, 40), (1, 9, 3), (3, 1, 0)])
def test_the_schedule_of_lavis_is_exact_at_every_step(epochs: int, steps: int, warmup_steps: int) -> None:
    keys = LAVIS | {"warmup_steps": warmup_steps, "epochs": epochs}
    schedule = LinearWarmupCosineLR(**keys, lr_decay_rate=1.0)
    total = epochs * steps
    ours = [schedule(step, peak=0.5, total=total) for step in range(total)]
    assert ours == pytest.approx(lavis_rates(epochs, steps, warmup_steps), rel=1e-12)
    by_step = LinearWarmupCosineLR(**keys | {"epochs": None}, lr_decay_rate=1.0)
    starts = [step for step in range(steps, total, steps) if step >= warmup_steps]
    assert [by_step(step, peak=0.5, total=total) for step in starts] == pytest.approx([ours[step] for step in starts])


def test_the_warmup_is_given_in_steps_or_as_a_share():
    by_ratio = WarmupCosine(initial_lr=0.0, warmup_steps=None, warmup_ratio=0.2, min_lr=0.0)
    assert by_ratio.warmup(135) == 27
    assert by_ratio.warmup(4) == 1  # 0.8 rounded
    steps_win = WarmupCosine(initial_lr=0.0, warmup_steps=10, warmup_ratio=0.2, min_lr=0.0)
    assert steps_win.warmup(135) == 10
    assert LinearWarmupCosineLR(**LAVIS, lr_decay_rate=1.0).warmup(135) == 20


def test_a_warmup_longer_than_the_run_is_cut_off():
    schedule = WarmupCosine(initial_lr=0.0, warmup_steps=100, warmup_ratio=0.0, min_lr=0.0)
    assert [schedule(step, peak=1.0, total=4) for step in range(4)] == [0.0, 0.01, 0.02, 0.03]


def test_the_decay_of_wsd_waits_for_the_warmup():
    schedule = WSD(
        initial_lr=0.0,
        warmup_steps=6,
        warmup_ratio=0.0,
        decay_steps=None,
        decay_ratio=1.0,
        decay_shape=Shape.linear,
        min_lr=0.0,
    )
    rates = [schedule(step, peak=1.0, total=10) for step in range(10)]
    assert rates == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(**NO_WARMUP | {"initial_lr": -1e-5}), "initial_lr=-1e-05: must not be negative"),
        (lambda: Constant(**NO_WARMUP | {"warmup_steps": -1}), "warmup_steps=-1: must not be negative"),
        (lambda: Constant(**NO_WARMUP | {"warmup_ratio": 1.5}), "warmup_ratio=1.5: must lie between 0 and 1"),
        (lambda: WarmupCosine(**WARMUP, min_lr=math.nan), "min_lr=nan: must not be negative"),
        (lambda: WSD(**WARMUP, **DECAY | {"decay_ratio": 2.0}, decay_shape=Shape.sqrt), "decay_ratio=2.0: must lie"),
        (lambda: WSD(**WARMUP, **DECAY | {"decay_steps": -2}, decay_shape=Shape.sqrt), "decay_steps=-2: must not"),
        (lambda: StepDecay(**WARMUP, milestones=[], every=None, factor=0.1), r"milestones=\[\], every=None: give one"),
        (lambda: StepDecay(**WARMUP, milestones=[5], every=3, factor=0.1), r"milestones=\[5\], every=3: give one"),
        (lambda: StepDecay(**WARMUP, milestones=[5, 5], every=None, factor=0.1), r"milestones=\[5, 5\]: .* increase"),
        (lambda: StepDecay(**WARMUP, milestones=[], every=0, factor=0.1), "every=0: must be positive"),
        (lambda: StepDecay(**WARMUP, milestones=[], every=3, factor=1.1), "factor=1.1: must lie between 0 and 1"),
        (
            lambda: Exponential(**WARMUP, decay_rate=0.9, decay_steps=None, min_lr=0.0),
            "decay_rate=0.9, decay_steps=None",
        ),
        (lambda: Exponential(**WARMUP, decay_rate=1.2, decay_steps=9, min_lr=0.0), "decay_rate=1.2: must lie"),
        (lambda: Exponential(**WARMUP, decay_rate=None, decay_steps=None, min_lr=0.0), "min_lr=0.0: an exponential"),
        (
            lambda: LinearWarmupCosineLR(**LAVIS | {"min_lr": 1.0}, lr_decay_rate=1.0),
            "min_lr=1.0: must not exceed",
        ),
        (lambda: LinearWarmupCosineLR(**LAVIS, lr_decay_rate=1.5), "lr_decay_rate=1.5: must not exceed 1"),
        (lambda: LinearWarmupCosineLR(**LAVIS, lr_decay_rate=0.0), "lr_decay_rate=0.0: must be positive"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_a_schedule_that_would_rise_above_the_peak_is_refused():
    schedule = WarmupCosine(**WARMUP, min_lr=5e-5)
    schedule.check_peak(5e-5)
    with pytest.raises(ValueError, match=r"^min_lr=5e-05: above the peak, optimizer.lr=4e-05"):
        schedule.check_peak(4e-5)
    with pytest.raises(ValueError, match=r"^initial_lr=1e-05: above the peak, optimizer.lr=1e-06"):
        Constant(**WARMUP).check_peak(1e-6)
