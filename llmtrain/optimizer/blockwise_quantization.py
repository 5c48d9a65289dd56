"""Block-wise quantisation to 8 bits (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861, sections 1.2 and 2).

A block's numbers are divided by the largest of their magnitudes, which is kept in fp32, and each becomes the code of
one of 256 values between -1 (or 0) and 1.  These follow the paper's dynamic tree quantisation: each decade down to
1e-6 has half as many, evenly spaced, as the one above it.  Three things differ from the paper:

- Unsigned numbers (second moments) are encoded on squares of these values, down to 1e-13, as the update uses
  their root.  Otherwise all elements with gradients below 1/1750 of the block's largest would share one code.
- Numbers are rounded stochastically (``stochastic_rounding``), not to the nearest, so that an average
  also follows changes smaller than half a step of the codes.
- The signed values go from -1 to 1, where the paper's go from -0.993: otherwise the largest of a block would lose
  0.7% a step whenever it is negative.  The smallest negative value, -5.5e-7, is left out instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # numbers that share a scale
DECADES = 7


class Codebook(NamedTuple):
    """Values of the codes, with tables for a fast lookup; a binary search takes 10 times as long on a CPU."""

    values: Tensor  # (256,) fp32, ascending
    above: Tensor  # (256,) fp32: the next value; infinity for the last one
    inverse_gap: Tensor  # (256,) fp32: 1 / (above - value)
    floor: Tensor  # (65536,) int32: code of the smallest number whose fp32 begins with these 16 bits, rounded down
    is_signed: bool

    @classmethod
    def make(cls, *, signed: bool, device: torch.device) -> "Codebook":
        """Make the codebook for signed numbers, or for squares."""
        values = dynamic_values(signed=True) if signed else dynamic_values(signed=False).square()
        above = torch.cat([values[1:], torch.tensor([torch.inf], dtype=torch.float64)])
        # No two values share the first 16 bits, so a number's code is its prefix's or the next one.
        prefixes = torch.arange(1 << 16, dtype=torch.int32)
        smallest = (prefixes << 16).view(torch.float32)
        largest_magnitude = ((prefixes << 16) | 0xFFFF).view(torch.float32)
        smallest = torch.where(smallest.signbit(), largest_magnitude, smallest).nan_to_num(nan=0.0)
        floor = (torch.bucketize(smallest, values.float(), right=True) - 1).clamp(0, 255).to(torch.int32)
        values, above, inverse_gap = (table.float() for table in (values, above, 1 / (above - values)))
        return cls(values.to(device), above.to(device), inverse_gap.to(device), floor.to(device), signed)


def dynamic_values(*, signed: bool) -> Tensor:
    """Return the paper's 256 values, except for -1 (see above), ascending (256,) fp64.

    Decade i from below holds the means of neighbours of 2**i + 1 points (2**(i + 1) + 1 without a sign) between 0.1
    and 1, times 10**(i - 6); signed, each occurs with both signs.  0 and 1 are added.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for i in range(DECADES):
        points = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        decade = 10.0 ** (i - DECADES + 1) * (points[1:] + points[:-1]) / 2
        values.append(decade)
        if signed:
            values.append(torch.tensor([-1.0], dtype=torch.float64) if i == 0 else -decade)
    return torch.cat(values).sort().values


def quantise(x: Tensor, book: Codebook, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (blocks, numbers) uint8 and scales (blocks,) of ``x`` (blocks, numbers) fp32.

    ``uniform`` has random numbers between 0 and 1, of the shape of ``x``.  :func:`dequantise` returns one of the two
    values around each number; its expected value is the number.  One exception: an unsigned number other than 0 becomes
    at least the smallest value, never 0, since a second moment of 0 would make the update unbounded.
    """
    scales = x.abs().amax(dim=1)
    scaled = (x / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).flatten()
    prefix = (scaled.view(torch.int32) >> 16) & 0xFFFF
    code = book.floor.index_select(0, prefix)
    code = code + (scaled >= book.above.index_select(0, code))
    share = (scaled - book.values.index_select(0, code)) * book.inverse_gap.index_select(0, code)
    code = code + (share > uniform.flatten())
    if not book.is_signed:
        code = torch.maximum(code, (scaled > 0).to(code.dtype))
    return code.to(torch.uint8).view_as(x), scales


def dequantise(codes: Tensor, scales: Tensor, book: Codebook) -> Tensor:
    """Decode to numbers (blocks, numbers) fp32."""
    values = book.values.index_select(0, codes.flatten().to(torch.int32))
    return values.view(codes.shape) * scales.unsqueeze(1)
