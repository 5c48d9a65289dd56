"""Stochastic rounding: up or down at random, with the probabilities that keep the expected value.

Rounding to the nearest loses every change that is smaller than half a step of the format: with beta2 = 0.999 a second
moment in bf16, whose steps are 0.4 to 0.8% of the value, would never become smaller.  Rounded stochastically,
the expected change is exact (Gupta et al. 2015, https://arxiv.org/abs/1502.02551).

The random numbers are a hash of the parameter's name, the optimizer's step and the element's number, so a resumed run
draws the same ones; no generator state is stored, and the step may stay on the device.
"""

import zlib

import torch
from torch import Tensor

BITS = 16  # of a random number

# Two's complement of odd 32-bit constants: the golden ratio's, and those of the hash "lowbias32" (C. Wellons,
# https://nullprogram.com/blog/2018/07/31/).  Products wrap around.
GOLDEN = 0x9E3779B9 - (1 << 32)
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


def step_seeds(steps: Tensor) -> Tensor:
    """Compute int32 seeds, one for each of the optimizer's ``steps``."""
    return _mix(steps.to(torch.int32) * GOLDEN)


def name_seed(name: str) -> int:
    """Compute the seed of the parameter ``name``, which is added to that of the step; it fits into int32."""
    return _wrapped(zlib.crc32(name.encode()))


def noise(seed: Tensor, count: int, begin: int = 0) -> tuple[Tensor, Tensor]:
    """Return two random int32 vectors (count,), uniform in [0, 2**BITS), on the device of the int32 number ``seed``.

    They are those of a parameter's elements from ``begin`` on.
    """
    if begin:
        seed = seed + _wrapped(begin * GOLDEN)
    mixed = _mix(torch.arange(count, dtype=torch.int32, device=seed.device) * GOLDEN + seed)
    mask = (1 << BITS) - 1
    return mixed & mask, (mixed >> BITS) & mask


def _wrapped(number: int) -> int:
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _mix(x: Tensor) -> Tensor:
    # the masks clear the sign bits that >> shifts in
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def to_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """Round fp32 ``x`` to bf16; the probability of rounding up is the fraction of a step that is cut off.

    ``noise`` has the shape of ``x``.  Numbers that bf16 can represent do not change.
    """
    bits = (x.view(torch.int32) + noise) & -(1 << BITS)
    return bits.view(torch.float32).to(torch.bfloat16)
