"""The key-value cache of incremental decoding."""

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_TOKENS = 256  # capacity of the first allocation


@dataclass(frozen=True)
class FixedShape:
    """The shapes and addresses of a forward pass that reads one token: the same for many tokens in a row.

    So the pass can be recorded once and repeated.  The place of the token is not a number of the program but on the
    device, and a mask hides the keys behind it.
    """

    position: Tensor  # (1,), int64: the index of the token
    seen: int  # keys, those that are not written yet included


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
        self.fixed: FixedShape | None = None

    def layer(self, index: int) -> "LayerCache":
        return LayerCache(self, index)

    def positions(self, new: int, device: torch.device) -> Tensor:
        """The positions ``(new,)`` of the tokens that a forward pass reads."""
        if self.fixed is not None:
            return self.fixed.position
        return torch.arange(self.length, self.length + new, device=device)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` new tokens, after all layers have been updated; with fixed shapes the caller counts."""
        if self.fixed is None:
            self.length += tokens

    def fix(self, fixed: FixedShape | None) -> None:
        """Fix the shapes of the passes that follow; None: passes of any number of tokens again."""
        self.fixed = fixed
        if fixed is not None:
            for buffers in (self.keys, self.values):
                for index in range(len(buffers)):
                    self.make_room(buffers, index, fixed.seen)
                    buffers[index][:, :, self.length : fixed.seen] = 0  # a hidden value times 0 has to be 0

    def make_room(self, buffers: list[Tensor], index: int, tokens: int) -> None:
        """Let the buffer of a layer have room for ``tokens`` tokens."""
        held = buffers[index]
        batch, heads, room, head_size = held.shape
        if tokens > room:
            room = min(max(2 * room, tokens, FIRST_TOKENS), self.capacity)
            grown = held.new_empty((batch, heads, room, head_size))
            grown[:, :, : self.length] = held[:, :, : self.length]
            buffers[index] = grown


@dataclass(frozen=True)
class LayerCache:
    """The view of one layer into a :class:`KVCache`."""

    cache: KVCache
    index: int

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``keys`` and ``values`` ``(batch, heads, new, head_size)``; return all so far."""
        return self._add(self.cache.keys, keys), self._add(self.cache.values, values)

    def _add(self, buffers: list[Tensor], new: Tensor) -> Tensor:
        if (fixed := self.cache.fixed) is not None:
            buffer = buffers[self.index]
            buffer.index_copy_(2, fixed.position, new.to(buffer.dtype))
            return buffer[:, :, : fixed.seen]
        held = self.cache.length
        end = held + new.shape[2]
        assert end <= self.cache.capacity
        self.cache.make_room(buffers, self.index, end)
        buffers[self.index][:, :, held:end] = new
        return buffers[self.index][:, :, :end]
