"""The key-value cache of incremental decoding."""

from dataclasses import dataclass

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, one preallocated pair of buffers a layer."""

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (layers, batch, heads, length, head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held
        self.capacity = length

    def layer(self, index: int) -> "LayerCache":
        """The part of the layer ``index``."""
        return LayerCache(self.keys[index], self.values[index], self.length)

    def advance(self, tokens: int) -> None:
        """Called once after all layers have been updated with ``tokens`` new tokens."""
        self.length += tokens


@dataclass(frozen=True)
class LayerCache:
    """What one layer sees of a :class:`KVCache`, whose buffers it shares."""

    keys: Tensor  # (batch, heads, capacity, head_size)
    values: Tensor
    length: int  # tokens held before this update

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``keys`` and ``values`` ``(batch, heads, new, head_size)``; return all that there are so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]
