"""Stochastic rounding and its random numbers."""

import pytest
import torch

from llmtrain.optimizer.stochastic_rounding import BITS, name_seed, noise, step_seeds, to_bf16


def seed(step: int, name: str = "blocks.0.weight") -> torch.Tensor:
    return step_seeds(torch.tensor([float(step)]))[0] + name_seed(name)


def test_the_random_numbers_follow_from_name_step_and_element():
    whole = noise(seed(7), 1000)
    again = noise(seed(7), 1000)
    part = noise(seed(7), 700, begin=300)  # as another size of stretches would ask for them
    for number in (0, 1):
        assert torch.equal(whole[number], again[number])
        assert torch.equal(whole[number][300:], part[number])
    for other in (noise(seed(8), 1000), noise(seed(7, name="blocks.1.weight"), 1000)):
        assert (whole[0] == other[0]).float().mean() < 0.02
    far = 3_000_000_000  # beyond int32
    assert torch.equal(noise(seed(7), 20, begin=far)[0][10:], noise(seed(7), 10, begin=far + 10)[0])


def test_random_numbers_are_uniform_over_elements_and_steps():
    first, second = noise(seed(3), 1 << 16)
    over_steps = torch.stack([noise(s, 8)[0] for s in step_seeds(torch.arange(1.0, 4097.0))])
    for numbers in (first, second, *over_steps.T):
        counts = torch.histc(numbers.float(), bins=64, min=0, max=1 << BITS)
        expected = len(numbers) / 64
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert 25 < chi_squared < 120  # 63 degrees of freedom: one in 100,000 lies outside
        assert 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << BITS
    table = torch.stack([first, second, first.roll(1), noise(seed(4), 1 << 16)[0]]).double()
    assert (torch.corrcoef(table) - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bf16_keeps_the_mean(sign):
    """1 + k/8 of a step of bf16, which is 2**-7 there, is rounded up in k/8 of the cases."""
    draws = 1 << 15
    for eighths in range(9):
        x = torch.full((draws,), sign * (1 + eighths / 8 * 2**-7))
        rounded = to_bf16(x, noise(seed(eighths), draws)[0])
        assert rounded.dtype == torch.bfloat16
        assert set(rounded.tolist()) <= {sign, sign * (1 + 2**-7)}
        up = (rounded != sign).float().mean().item()
        assert up == pytest.approx(eighths / 8, abs=0.012)
        if eighths in (0, 8):
            assert up == eighths / 8


def test_bf16_keeps_zeros_and_infinities():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])
    rounded = to_bf16(x, torch.full((5,), (1 << BITS) - 1, dtype=torch.int32))
    assert rounded[:4].tolist() == [0.0, -0.0, torch.inf, -torch.inf]
    assert 0 <= float(rounded[4]) < 2e-40
