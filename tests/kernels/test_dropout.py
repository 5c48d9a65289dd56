"""Dropout on a CPU: the share, the scale, the gradients, and attention compared with torch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.kernels import dropout as module
from llmtrain.kernels.dropout import Dropout, attend_with_dropout, draw_kept
from llmtrain.model.layers.attention import attend

RATE = 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_share_of_zeros_is_the_rate_and_the_mean_stays(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(40_001, dtype=dtype, requires_grad=True)
    y = Dropout(RATE)(x)
    zeros = (y == 0).double().mean().item()
    assert abs(zeros - RATE) < 5 * math.sqrt(RATE * (1 - RATE) / len(x))
    assert y.dtype == dtype
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - RATE)))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_any_two_neighbours_are_independent() -> None:
    """Four elements share a random number: none of its parts may depend on another."""
    torch.manual_seed(0)
    kept = draw_kept(torch.Size((100_000, 4)), 0.5)[0].double()
    correlations = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlations.abs().max() < 5 / math.sqrt(len(kept))
    assert (kept.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(kept))


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.5, 0.999999])
def test_the_scale_follows_the_rate_that_can_be_drawn(rate: float) -> None:
    torch.manual_seed(0)
    kept, scale = draw_kept(torch.Size((1 << 20,)), rate)
    share = 1 / scale
    assert abs(share - (1 - rate)) <= 1 / module.LEVELS
    assert abs(kept.double().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / kept.numel())


def test_the_same_seed_draws_the_same() -> None:
    x = torch.randn(7, 13)
    torch.manual_seed(3)
    first = Dropout(0.5)(x)
    second = Dropout(0.5)(x)
    torch.manual_seed(3)
    assert torch.equal(first, Dropout(0.5)(x))
    assert not torch.equal(first, second)


def test_nothing_is_dropped_outside_of_training() -> None:
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def heads(number: int, length: int = 24) -> Tensor:
    return torch.randn(2, number, length, 8, dtype=torch.float64, requires_grad=True)


def masks() -> dict[str, Tensor | None]:
    visible = torch.ones(24, 24, dtype=torch.bool).tril() & (torch.rand(2, 1, 24, 24) < 0.5)
    visible |= torch.eye(24, dtype=torch.bool)
    return {"causal": None, "boolean": visible, "added": torch.randn(4, 24, 24, dtype=torch.float64)}


@pytest.mark.parametrize("name", ["causal", "boolean", "added"])
def test_attention_without_a_dropped_element_is_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = heads(4), heads(4), heads(4)
    mask = masks()[name]
    monkeypatch.setattr(module, "draw_kept", lambda shape, rate: (torch.ones(shape, dtype=torch.bool), 1.0))
    ours = attend_with_dropout(query, key, value, mask, RATE)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), (query, key, value)),
        torch.autograd.grad((theirs * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_mean_of_attention_with_dropout_is_attention() -> None:
    """With fewer heads of keys than of queries, and through the door that models take."""
    torch.manual_seed(0)
    query, key, value = heads(4), heads(2), heads(2)
    with torch.no_grad():
        plain = attend(query, key, value, None)
        drawn = torch.stack([attend(query, key, value, None, 0.5) for _ in range(2000)])
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - plain).abs() < 6 * error + 1e-12).all()
    assert not torch.equal(drawn[0], drawn[1])


def test_a_token_behind_cached_keys_sees_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw_kept", lambda shape, rate: (torch.ones(shape, dtype=torch.bool), 1.0))
    query, key, value = heads(2, 1), heads(2, 9), heads(2, 9)
    torch.testing.assert_close(attend(query, key, value, None, 0.5), F.scaled_dot_product_attention(query, key, value))


def test_attention_with_dropout_computes_in_bf16_under_autocast() -> None:
    query, key, value = (tensor.float() for tensor in (heads(2), heads(2), heads(2)))
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_with_dropout(query, key, value, None, RATE).dtype == torch.bfloat16


def test_the_softmax_of_rounded_scores_computes_in_fp32() -> None:
    """In bf16 only its input and its result are rounded."""
    scores = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).mul_(4).bfloat16()
    assert torch.equal(scores.softmax(-1), scores.float().softmax(-1).bfloat16())
