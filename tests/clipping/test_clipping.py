"""Every clipping against float64 arithmetic and, where torch has it, against torch."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtrain.clipping.adaptive import AdaptiveClipping
from llmtrain.clipping.base import measure
from llmtrain.clipping.none import NoClipping
from llmtrain.clipping.norm import NormClipping
from llmtrain.clipping.per_parameter import PerParameterClipping
from llmtrain.clipping.value import ValueClipping
from tests.helpers.gpu_without_data import allow_gpu_tensors
from tests.helpers.options import make_option, option_names

SHAPES = {"embedding.weight": (20, 8), "mlp.weight": (6, 8), "mlp.bias": (6,), "conv.weight": (4, 3, 5), "scale": ()}

# limits that some of the gradients below exceed and others do not
COMMON = {
    "max_norm": 1.0, "max_value": 0.5, "thresholds": {"mlp": 2.0, "weight": 5.0}, "clip_factor": 0.9, "eps": 1e-3,
    "exclude": ["embedding"],
}  # fmt: skip
LIMITS = {"per_parameter": {"max_norm": 3.0}}  # where an option needs another one
OPTIONS = option_names("clipping")
CLIPPING = [option for option in OPTIONS if option != "none"]


def make_clipping(option, **keys):
    return make_option("clipping", option, COMMON, **LIMITS.get(option, {}) | keys)


@pytest.fixture
def parameters():
    """Named parameters with random gradients, and one without any."""
    generator = torch.Generator().manual_seed(3)
    named = []
    for name, shape in SHAPES.items():
        parameter = nn.Parameter(torch.randn(shape, generator=generator))
        parameter.grad = torch.randn(shape, generator=generator)
        named.append((name, parameter))
    return [*named, ("unused.weight", nn.Parameter(torch.ones(2, 2)))]


def gradients(parameters):
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def by_hand(option, parameters):
    """The formulas of the docstrings in float64."""
    result = {}
    everything = flat(gradients(parameters)).norm()
    for name, p in parameters:
        if p.grad is None:
            continue
        g, w = p.grad.double(), p.detach().double()
        if option == "norm":
            g = g * min(1.0, 1.0 / everything)
        elif option == "value":
            g = g.clip(-0.5, 0.5)
        elif option == "per_parameter":
            limit = 2.0 if "mlp" in name else 5.0 if "weight" in name else 3.0
            g = g * min(1.0, limit / g.norm())
        elif option != "adaptive":
            raise NotImplementedError(f"clipping={option}: write its formula here")
        elif name != "embedding.weight":
            rows, weights = (t.reshape(len(t), -1) if t.dim() > 1 else t.reshape(1, -1) for t in (g, w))
            limits = 0.9 * weights.norm(dim=1).clip(min=1e-3)
            g = (rows * (limits / rows.norm(dim=1)).clip(max=1)[:, None]).reshape(g.shape)
        result[name] = g
    return result


@pytest.mark.parametrize("option", CLIPPING)
def test_clipping_equals_its_formula_in_float64(parameters, option):
    expected = by_hand(option, parameters)
    before = gradients(parameters)
    measured = make_clipping(option)(parameters, step=0)
    torch.testing.assert_close(
        {name: g.double() for name, g in gradients(parameters).items()}, expected, rtol=1e-6, atol=1e-9
    )
    changed = [name for name, g in gradients(parameters).items() if not torch.equal(g, before[name])]
    assert measured.clipped.item() is True
    assert changed


@pytest.mark.parametrize("option", OPTIONS)
def test_the_norm_is_measured_before_clipping(parameters, option):
    everything = flat(gradients(parameters))
    measured = make_clipping(option)(parameters, step=0)
    assert measured.norm.item() == pytest.approx(everything.norm().item(), rel=1e-6)
    assert measured.largest.item() == pytest.approx(everything.abs().max().item(), rel=1e-7)
    assert [(t.shape, t.dtype) for t in measured[:3]] == [((), torch.float32), ((), torch.float32), ((), torch.bool)]
    assert all(p.grad is None for name, p in parameters if name == "unused.weight")


@pytest.mark.parametrize("option", CLIPPING)
def test_clipping_waits_for_start_step(parameters, option):
    before = gradients(parameters)
    clipping = make_clipping(option, start_step=3)
    measured = clipping(parameters, step=2)
    assert measured.clipped.item() is False
    assert measured.norm.item() == pytest.approx(flat(before).norm().item(), rel=1e-6)
    assert all(torch.equal(g, before[name]) for name, g in gradients(parameters).items())
    assert clipping(parameters, step=3).clipped.item() is True


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_within_bounds_keep_every_bit(parameters, option):
    for _, p in parameters:
        if p.grad is not None:
            p.grad.mul_(1e-3)
    before = gradients(parameters)
    measured = make_clipping(option)(parameters, step=0)
    assert measured.clipped.item() is False
    assert all(g.numpy().tobytes() == before[name].numpy().tobytes() for name, g in gradients(parameters).items())


def test_a_norm_that_is_exactly_the_limit_is_not_clipped():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    measured = NormClipping(max_norm=5.0, start_step=0)([("w", parameter)], step=0)
    assert measured.clipped.item() is False
    assert parameter.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("option", OPTIONS)
def test_the_largest_element_is_measured_on_demand(parameters, option):
    measured = make_clipping(option)(parameters, step=0, largest=False)
    assert measured.largest is None
    assert bool(measured.clipped) == (option != "none")


@pytest.mark.parametrize("max_norm", [0.3, 100.0])
def test_the_update_on_a_gpu_divides_by_the_excess_of_the_norm(parameters, max_norm):
    """The divisor has the value by which gradients are divided on a CPU, exactly 1 within the limit."""
    allow_gpu_tensors()
    before = gradients(parameters)
    clipping = NormClipping(max_norm=max_norm, start_step=0)
    norm = clipping(parameters, 0).norm
    ratios = [before[name] / g for name, g in gradients(parameters).items()]
    divisor = clipping.divisor(norm)
    assert all(torch.allclose(ratio, divisor, rtol=1e-6) for ratio in ratios)
    assert (divisor.item() == 1) == (max_norm == 100.0)
    assert not clipping.divisor(torch.tensor(math.nan)).isfinite()
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = nn.Parameter(torch.zeros(3, device="cuda"))
        weight.grad = torch.ones(3, device="cuda")
        result = clipping([("w", weight)], 0)
    assert result.divisor is not None
    assert (result.divisor.device.type, result.divisor.dtype, result.divisor.shape) == ("cuda", torch.float32, ())


@pytest.mark.parametrize("max_norm", [0.3, 1.0, 100.0])
def test_norm_and_value_equal_torch(parameters, max_norm):
    theirs = [nn.Parameter(p.detach().clone()) for _, p in parameters]
    for other, (_, p) in zip(theirs, parameters, strict=True):
        other.grad = None if p.grad is None else p.grad.clone()
    norm = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert NormClipping(max_norm=max_norm, start_step=0)(parameters, 0).norm.item() == pytest.approx(
        norm.item(), rel=1e-6
    )
    nn.utils.clip_grad_value_(theirs, 0.05)
    ValueClipping(max_value=0.05, start_step=0)(parameters, 0)
    for other, (name, p) in zip(theirs, parameters, strict=True):
        if p.grad is not None:  # torch divides by the norm + 1e-6
            torch.testing.assert_close(p.grad, other.grad, rtol=2e-6, atol=1e-9, msg=name)


def test_the_norm_of_a_large_gradient_is_right():
    """torch's own on the CPU is 0.1% off at this size."""
    parameter = nn.Parameter(torch.empty(12_000, 512))
    parameter.grad = torch.randn(12_000, 512, generator=torch.Generator().manual_seed(0)) * 1e-3
    norm = NoClipping()([("embedding.weight", parameter)], 0).norm
    assert norm.item() == pytest.approx(parameter.grad.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("option", CLIPPING)
def test_other_precisions_are_measured_in_fp32_or_better(parameters, option, dtype):
    for _, p in parameters:
        p.data = p.data.to(dtype)
    named = [(name, p) for name, p in parameters if name != "unused.weight"]
    for name, p in named:
        p.grad = None
        p.grad = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name))).to(dtype)
    everything = flat(gradients(named))
    expected = by_hand(option, named)
    measured = make_clipping(option)(named, step=0)
    assert measured.norm.dtype == torch.float32
    assert measured.norm.item() == pytest.approx(everything.norm().item(), rel=1e-6)
    rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    for name, g in gradients(named).items():
        assert g.dtype == dtype
        torch.testing.assert_close(
            g.double(), expected[name], rtol=rounding, atol=1e-6 if dtype != torch.float64 else 1e-15
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_nonfinite_gradient_makes_the_norm_nonfinite(parameters, option, bad):
    parameters[1][1].grad[2, 3] = bad
    measured = make_clipping(option)(parameters, step=0)
    assert not measured.norm.isfinite().item()
    assert not measured.largest.isfinite().item()


@pytest.mark.parametrize("option", OPTIONS)
def test_the_norm_is_zero_without_any_gradient(option):
    named = [("weight", nn.Parameter(torch.ones(2)))]
    measured = make_clipping(option)(named, step=0)
    assert [value.item() for value in measured[:3]] == [0.0, 0.0, False]


def test_adaptive_lets_a_zero_unit_learn_and_leaves_a_zero_gradient(parameters):
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    AdaptiveClipping(clip_factor=0.5, eps=1e-2, exclude=[], start_step=0)([("w", weight)], 0)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.003, 0.0, 0.004], [0.0, 0.0, 0.0]]))


def test_per_parameter_takes_the_first_matching_threshold():
    clipping = PerParameterClipping(max_norm=1.0, thresholds={r"bias$": 0.1, "mlp": 0.2}, start_step=0)
    limits = {"mlp.bias": 0.1, "mlp.weight": 0.2, "attention.bias": 0.1, "attention.weight": 1.0}
    assert {name: clipping.threshold(name) for name in limits} == limits


def test_patterns_without_match_are_refused():
    names = list(SHAPES)
    per_parameter = PerParameterClipping(max_norm=1.0, thresholds={"mlp": 0.2, "atention": 0.1}, start_step=0)
    with pytest.raises(ValueError, match=r"^thresholds='atention': matches no parameter; the nearest are "):
        per_parameter.check_parameters(names)
    adaptive = AdaptiveClipping(clip_factor=0.1, eps=1e-3, exclude=["mlp", "head"], start_step=0)
    with pytest.raises(ValueError, match=r"^exclude\[1\]='head': matches no parameter"):
        adaptive.check_parameters(names)
    for option in OPTIONS:
        make_clipping(option).check_parameters(names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormClipping(max_norm=0.0, start_step=0), "max_norm=0.0: must be positive"),
        (lambda: NormClipping(max_norm=1.0, start_step=-1), "start_step=-1: must not be negative"),
        (lambda: ValueClipping(max_value=-1.0, start_step=0), "max_value=-1.0: must be positive"),
        (lambda: PerParameterClipping(max_norm=0.0, thresholds={}, start_step=0), "max_norm=0.0: must be positive"),
        (
            lambda: PerParameterClipping(max_norm=1.0, thresholds={"a": -1.0}, start_step=0),
            r"thresholds\['a'\]=-1.0: must be positive",
        ),
        (
            lambda: PerParameterClipping(max_norm=1.0, thresholds={"(": 1.0}, start_step=0),
            r"thresholds='\(': not a regular expression",
        ),
        (
            lambda: AdaptiveClipping(clip_factor=0.0, eps=1e-3, exclude=[], start_step=0),
            "clip_factor=0.0: must be positive",
        ),
        (
            lambda: AdaptiveClipping(clip_factor=0.1, eps=0.0, exclude=[], start_step=0),
            "eps=0.0: must be positive",
        ),
        (
            lambda: AdaptiveClipping(clip_factor=0.1, eps=1e-3, exclude=["a", "["], start_step=0),
            r"exclude\[1\]='\[': not a regular expression",
        ),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.gpu
@pytest.mark.parametrize("option", CLIPPING)
def test_clipping_on_a_gpu_gives_the_same_without_waiting(parameters, option):
    expected = by_hand(option, parameters)
    norm = flat(gradients(parameters)).norm()
    for _, p in parameters:
        gradient, p.grad = p.grad, None
        p.data = p.data.cuda()
        p.grad = None if gradient is None else gradient.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured = make_clipping(option)(parameters, step=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert measured.norm.item() == pytest.approx(norm.item(), rel=1e-6)
    divisor = 1.0 if measured.divisor is None else measured.divisor.item()
    result = {name: g.cpu().double() / divisor for name, g in gradients(parameters).items()}
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)


def test_norm_of_a_long_stretch_is_exact() -> None:
    """ZeRO's gradients have one dimension; in one sum torch's fp32 norm would be 2e-4 too small."""
    weight = torch.nn.Parameter(torch.zeros(8_000_001))
    weight.grad = torch.randn(len(weight), generator=torch.Generator().manual_seed(0))
    norm = measure([("w", weight)]).norm
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(weight.grad, dtype=torch.float64).item(), rel=1e-6)
