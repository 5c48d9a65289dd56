"""Norms in autocast's dtype against float64, and products that share a cast against products that cast alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model.layers.norms import LayerNorm, RMSNorm, lower_norms, share
from tests.helpers.operations import Operations

LOW = torch.bfloat16
HALF_STEP = 2**-9  # of bf16, relative


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str) -> nn.Module:
    norm = LayerNorm(96) if kind == "layer" else RMSNorm(96, 1e-5)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(1.0 + 0.2 * draw(96, seed=seed + 5))
    return norm


def exact(kind: str, x: Tensor, norm: nn.Module) -> Tensor:
    if kind == "layer":
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * norm.weight.double() + norm.bias.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_low_norms_are_as_exact_as_bf16_allows(kind: str) -> None:
    """Rounded: the input, weight, bias and result, and the sums of the gradient's products; not the statistics."""
    norm = make(kind)
    lower_norms([norm])
    x = (3.0 * draw(7, 96) + 50.0).to(LOW)  # a mean in bf16 would be off by 0.2
    low_input, wide_input = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cpu", LOW):
        y = norm(low_input)
    expected = exact(kind, wide_input, norm)
    assert y.dtype == LOW
    assert ((y.double() - expected).abs() <= 4 * HALF_STEP * (expected.abs() + 2.0)).all()
    gradient = draw(7, 96, seed=2)
    y.backward(gradient.to(LOW))
    expected.backward(gradient.to(LOW).double())
    assert low_input.grad is not None
    assert wide_input.grad is not None
    assert (low_input.grad.double() - wide_input.grad).norm() < 4 * HALF_STEP * wide_input.grad.norm()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in norm.parameters())


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_low_norms_without_autocast_are_as_before(kind: str) -> None:
    norm, x = make(kind), draw(7, 96)
    before = norm(x)
    lower_norms([norm])
    assert torch.equal(norm(x), before)
    assert norm(x.double()).dtype == torch.float64 if kind == "rms" else True


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_low_norms_of_a_bf16_stream_write_no_fp32_activation(kind: str) -> None:
    norm = make(kind)
    lower_norms([norm])
    x, wide = draw(64, 96).to(LOW).requires_grad_(), []
    with torch.autocast("cpu", LOW), torch.autograd.graph.saved_tensors_hooks(
        lambda t: wide.append(t.dtype) or t if t.numel() >= 64 * 96 else t, lambda t: t
    ):  # fmt: skip
        norm(x).sum()
    assert kind == "rms" or (wide and set(wide) == {LOW})  # a CPU composes the RMSNorm of operations in fp32


def products(x: Tensor, weights: list[nn.Parameter], gradients: list[Tensor], *, shared: bool) -> dict[str, int]:
    operations = Operations()
    x = x.clone()  # autocast would keep the cast of a leaf
    with operations:
        with torch.autocast("cpu", LOW):
            inputs = share(x, len(weights)) if shared else (x,) * len(weights)
            results = [F.linear(each, weight) for each, weight in zip(inputs, weights, strict=True)]
        torch.autograd.backward(results, gradients)
    return operations.counts


@pytest.mark.parametrize("count", [2, 3])
def test_a_shared_cast_gives_the_bits_of_separate_casts(count: int) -> None:
    found = []
    for shared in (True, False):
        x = draw(33, 64).requires_grad_()
        weights = [nn.Parameter(draw(48, 64, seed=seed)) for seed in range(count)]
        gradients = [(10.0**seed * draw(33, 48, seed=seed + 9)).to(LOW) for seed in range(count)]
        counts = products(x, weights, gradients, shared=shared)
        assert x.grad is not None
        found.append((x.grad, *(weight.grad for weight in weights), counts["_to_copy"]))
    (*ours, casts), (*separate, separate_casts) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, separate, strict=True))
    assert separate_casts - casts == 2 * (count - 1)  # forward and backward


def test_nothing_is_shared_without_autocast_or_in_other_types() -> None:
    x = draw(3, 4)
    assert all(each is x for each in share(x, 3))
    with torch.autocast("cpu", LOW):
        assert [each.dtype for each in share(x.double(), 2)] == [torch.float64] * 2  # autocast leaves float64 as it is
        assert [each.dtype for each in share(x, 2)] == [LOW] * 2
        low = x.to(LOW)
        assert all(each is low for each in share(low, 2))
        with torch.no_grad():
            first, second = share(x, 2)
            assert first is second


def test_a_shared_input_that_only_some_products_use_has_their_gradient() -> None:
    x, weight = draw(5, 8).requires_grad_(), nn.Parameter(draw(6, 8))
    with torch.autocast("cpu", LOW):
        _, used = share(x, 2)
        F.linear(used, weight).sum().backward()
        (expected,) = torch.autograd.grad(F.linear(x, weight).sum(), x)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
