"""Weights in fewer bits: their error, reproducible bits, and gradients through them."""

import builtins
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.lora.layers import FrozenLinear
from llmtrain.lora.quantization import PackedWeight, Quantization

PACKED = (Quantization.bf16, Quantization.int8, Quantization.nf4)
BITS = {Quantization.bf16: 16, Quantization.int8: 8 + 32 / 256, Quantization.nf4: 4 + 8 / 64 + 32 / (64 * 256)}


def matrix(rows: int = 320, columns: int = 256, spread: float = 1.0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.02
    return weight * torch.exp(spread * torch.randn(rows, 1, generator=torch.Generator().manual_seed(4)))


def packed(quantization: Quantization, weight: Tensor) -> PackedWeight:
    if quantization is not Quantization.bf16:
        pytest.importorskip("bitsandbytes")
    result = quantization.pack(weight)
    assert result is not None
    return result


def test_none_leaves_weights_alone() -> None:
    assert Quantization.none.pack(matrix()) is None


@pytest.mark.parametrize("quantization", PACKED)
def test_packed_weights_take_their_number_of_bits(quantization: Quantization) -> None:
    weight = matrix()
    stored = sum(tensor.nbytes for tensor in packed(quantization, weight).stored.values())
    assert stored == pytest.approx(BITS[quantization] / 8 * weight.numel(), abs=4)


def test_packed_weights_are_off_by_half_a_step_at_most() -> None:
    """At most half a step: of bf16's 8 bits, of a row's 127, of the widest gap of nf4's 16 values in a block.

    nf4's scales are off by half a step too, 0.9 / 64 of the largest: that of bitsandbytes' 8-bit numbers.
    """
    weight = matrix()
    off = {q: (packed(q, weight).dense(torch.float32) - weight).abs() for q in PACKED}
    assert bool((off[Quantization.bf16] <= weight.abs() * 2**-8).all())
    largest = weight.abs().amax(1, keepdim=True)
    assert bool((off[Quantization.int8] <= largest * (0.5 / 127 + 2**-10)).all())
    blocks = weight.view(-1, 64).abs().amax(1, keepdim=True)
    scales = 0.5 * 0.9 / 64 * float(blocks.max())
    assert bool((off[Quantization.nf4].view(-1, 64) <= (blocks + scales) * (1 - 0.6962) / 2 + scales).all())
    assert float(off[Quantization.nf4].norm() / weight.norm()) < 0.12


@pytest.mark.parametrize("quantization", PACKED)
@pytest.mark.parametrize("shape", [(6, 8), (1, 64), (64, 64), (33, 130)])
def test_weights_of_any_shape_are_packed(quantization: Quantization, shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    dense = packed(quantization, weight).dense(torch.float32)
    assert dense.shape == shape
    assert dense.isfinite().all()
    torch.testing.assert_close(packed(quantization, torch.zeros(shape)).dense(torch.float32), torch.zeros(shape))


@pytest.mark.parametrize("quantization", PACKED)
def test_packing_the_same_weights_gives_the_same_bits(quantization: Quantization) -> None:
    one, other = (packed(quantization, matrix()).stored for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_int8_cannot_hold_are_refused(value: float) -> None:
    pytest.importorskip("bitsandbytes")
    weight = matrix()
    weight[3, 5] = value
    with pytest.raises(ValueError, match="quantization=int8: a weight is not finite, or beyond 65504"):
        Quantization.int8.pack(weight)


@pytest.mark.parametrize("quantization", PACKED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_rounded_weight(
    quantization: Quantization, bias: bool, dtype: torch.dtype
) -> None:
    """Those of a dense layer with the weight as it was rounded."""
    linear = nn.Linear(256, 320, bias=bias)
    linear.weight.requires_grad_(False)
    layer = FrozenLinear(linear, packed(quantization, linear.weight))
    dense = layer.own_weight.to(dtype)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight = torch.randn(2, 5, 320, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(x)
    assert y.dtype == dtype
    expected = F.linear(x.to(dtype), dense, None if linear.bias is None else linear.bias.to(dtype))
    inputs = [x] if linear.bias is None else [x, linear.bias]
    found = torch.autograd.grad((y.float() * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected.float() * weight).sum(), inputs)
    assert torch.equal(y, expected)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **keys: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *arguments, **keys)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install \"llmtrain\[quantization\]\""):
        Quantization.nf4.pack(matrix())
    assert Quantization.bf16.pack(matrix()) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", PACKED)
def test_packing_on_a_gpu_gives_the_values_of_a_cpu(quantization: Quantization) -> None:
    """As on a CPU, within the rounding of its kernels."""
    weight = matrix()
    there = packed(quantization, weight.cuda()).dense(torch.float32).cpu()
    step = weight.abs().view(-1, 64).amax(1, keepdim=True) / 100
    assert bool(((there - packed(quantization, weight).dense(torch.float32)).abs().view(-1, 64) <= step).all())
