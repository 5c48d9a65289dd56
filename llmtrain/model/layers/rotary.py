"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) and their scaling to longer contexts.

Channel i is rotated together with channel i + half, as in Hugging Face's Llama; angles are computed in fp32.
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

BETA_FAST, BETA_SLOW = 32, 1  # YaRN: turns in the original context of the kept and of the slowed channels


class Scaling(Enum):
    """The scaling of positions for contexts longer than the original one."""

    none = "none"
    linear = "linear"  # all angles divided by the factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595)
    dynamic = "dynamic"  # a larger theta for sequences longer than the original context: "dynamic NTK"
    llama3 = "llama3"  # slow channels divided, fast ones kept, those between interpolated: Llama 3.1
    yarn = "yarn"  # as llama3, with sharper scores (Peng et al. 2023, https://arxiv.org/abs/2309.00071)


NEEDS = {
    Scaling.none: (),
    Scaling.linear: ("factor",),
    Scaling.dynamic: ("factor", "original_context_length"),
    Scaling.llama3: ("factor", "low_freq_factor", "high_freq_factor", "original_context_length"),
    Scaling.yarn: ("factor", "original_context_length"),
}


@dataclass(frozen=True)
class Rotary:
    """Rotary positions, from the keys ``rope_*`` of a model."""

    head_size: int
    theta: float
    scaling: Scaling
    factor: float | None
    low_freq_factor: float | None
    high_freq_factor: float | None
    original_context_length: int | None

    def __post_init__(self) -> None:
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size}: must be even, since channels are rotated in pairs")
        if not 0 < self.theta < math.inf:
            raise ValueError(f"rope_theta={self.theta}: must be above 0; 10000 is usual")
        for key in NEEDS[Scaling.llama3]:
            value, needed = getattr(self, key), key in NEEDS[self.scaling]
            if value is None and needed:
                raise ValueError(
                    f"rope_{key}=null: rope_scaling={self.scaling.name} needs it; it is in the model's card"
                )
            if value is not None and not needed:
                fitting = [scaling.name for scaling, keys in NEEDS.items() if key in keys]
                raise ValueError(
                    f"rope_{key}={value}: rope_scaling={self.scaling.name} does not read it; take null, or "
                    f"rope_scaling={' or '.join(fitting)}"
                )
            if value is not None and not (value >= 1 if key != "low_freq_factor" else value > 0):
                raise ValueError(f"rope_{key}={value}: must be at least 1")
        if self.scaling is Scaling.llama3 and self.low_freq_factor >= self.high_freq_factor:  # type: ignore[operator]
            raise ValueError(
                f"rope_low_freq_factor={self.low_freq_factor}: must be below "
                f"rope_high_freq_factor={self.high_freq_factor}"
            )

    def changes_at(self, length: int) -> bool:
        """Return whether sequences of ``length`` tokens have other frequencies than short ones."""
        return self.scaling is Scaling.dynamic and length > (self.original_context_length or 0)

    def frequencies(self, device: torch.device, length: int = 0) -> Tensor:
        """Radians a token of each pair of channels ``(head_size / 2,)``, fp32, for sequences of ``length`` tokens."""
        index = torch.arange(0, self.head_size, 2, device=device, dtype=torch.float32)
        factor, original = self.factor or 1.0, self.original_context_length or 0
        theta = self.theta
        if self.changes_at(length):
            theta *= (factor * length / original - (factor - 1)) ** (self.head_size / (self.head_size - 2))
        plain = 1.0 / theta ** (index / self.head_size)
        if self.scaling is Scaling.linear:
            return plain / factor
        if self.scaling is Scaling.llama3:
            assert self.low_freq_factor is not None
            assert self.high_freq_factor is not None
            turns = original * plain / (2 * math.pi)  # in the original context
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            return torch.lerp(plain / factor, plain, kept.clamp(0, 1))
        if self.scaling is Scaling.yarn:
            low, high = math.floor(self._channel(BETA_FAST)), math.ceil(self._channel(BETA_SLOW))
            low, high = max(low, 0), min(high, self.head_size - 1)
            slowed = (index / 2 - low) / (high - low if high > low else 0.001)
            return torch.lerp(plain, plain / factor, slowed.clamp(0, 1))
        return plain

    def _channel(self, turns: float) -> float:
        """The index of the channel pair that makes ``turns`` turns in the original context."""
        assert self.original_context_length is not None
        ratio = self.original_context_length / (turns * 2 * math.pi)
        return self.head_size * math.log(ratio) / (2 * math.log(self.theta))

    @property
    def magnitude(self) -> float:
        """The factor on queries and keys."""
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling is Scaling.yarn and self.factor else 1.0


Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (batch or 1, sequence, 1, head_size / 2), fp32


def make_rotation(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> Rotation:
    """The cosines and sines for tokens at ``positions`` ``(batch or 1, sequence)``."""
    angles = positions[..., None, None].float() * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate ``heads`` ``(batch, sequence, heads, head_size)``; the result has their shape and dtype."""
    cosines, sines = rotation
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1).to(heads.dtype)
