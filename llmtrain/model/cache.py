"""The key-value cache of incremental decoding."""

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

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``keys`` and ``values`` ``(batch, heads, new, head_size)``; return all that ``layer`` has so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Called once after all layers have been updated with ``tokens`` new tokens."""
        self.length += tokens
