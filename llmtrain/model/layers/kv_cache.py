"""The key-value cache of incremental decoding."""

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_TOKENS = 256  # capacity of the first allocation


class KVCache:
    """Keys and values of the tokens so far: a pair of buffers for each layer, which grow up to ``length``.

    The buffers double as they grow: a context of 128 thousand tokens takes its gigabytes only when it fills.
    """

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
        shape = (batch, heads, 0, head_size)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.length = 0  # tokens held
        self.capacity = length

    def layer(self, index: int) -> "LayerCache":
        return LayerCache(self, index)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` new tokens, after all layers have been updated."""
        self.length += tokens


@dataclass(frozen=True)
class LayerCache:
    """The view of one layer into a :class:`KVCache`."""

    cache: KVCache
    index: int

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``keys`` and ``values`` ``(batch, heads, new, head_size)``; return all so far."""
        return self._add(self.cache.keys, keys), self._add(self.cache.values, values)

    def _add(self, buffers: list[Tensor], new: Tensor) -> Tensor:
        held, room = self.cache.length, buffers[self.index].shape[2]
        end = held + new.shape[2]
        assert end <= self.cache.capacity
        if end > room:
            batch, heads, _, head_size = new.shape
            room = min(max(2 * room, end, FIRST_TOKENS), self.cache.capacity)
            grown = buffers[self.index].new_empty((batch, heads, room, head_size))
            grown[:, :, :held] = buffers[self.index][:, :, :held]
            buffers[self.index] = grown
        buffers[self.index][:, :, held:end] = new
        return buffers[self.index][:, :, :end]
