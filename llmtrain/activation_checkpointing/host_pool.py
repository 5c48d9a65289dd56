"""Host memory for tensors that come and go: as much as is in use at once at most, and used again and again."""

import logging
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.base.host_memory import HostMemory, Registration, aligned

log = logging.getLogger(__name__)
MIN_PIECE = 1 << 20  # bytes: a smaller rest of a block is not worth a copy of its own


class Piece(NamedTuple):
    """A part of a block of memory."""

    block: int
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class HostPool:
    """Blocks of host memory, and the pieces of them that are free.

    A request takes the first piece that has room; if there is none it takes several smaller ones; a new block is made
    only for what is still missing.  A step that asks for the same sizes as the last one finds its tensors' places
    again, in one piece each; where sizes change, after a smaller micro-batch or with examples of other lengths, the
    blocks are divided in another way, and none is made unless more bytes are in use than ever before.
    """

    def __init__(
        self,
        registration: Registration | None,
        min_piece: int = MIN_PIECE,
        memory: Callable[[int, Registration | None], HostMemory] = HostMemory,
    ) -> None:
        self.registration = registration
        self.min_piece = min_piece
        self.memory = memory
        self.blocks: list[HostMemory] = []
        self.free: list[Piece] = []  # sorted, neighbours joined
        self._returned: deque[Piece] = deque()
        self._is_refusal_reported = False

    @property
    def num_bytes(self) -> int:
        """The size of all blocks."""
        return sum(block.data.nbytes for block in self.blocks)

    def take(self, num_bytes: int) -> list[Piece]:
        """Return pieces of ``num_bytes`` in all, rounded up to the alignment.

        Raises :class:`torch.OutOfMemoryError` if the system has no memory left.
        """
        while self._returned:
            self._add(self._returned.popleft())
        missing = aligned(num_bytes)
        whole = next((index for index, piece in enumerate(self.free) if piece.num_bytes >= missing), None)
        if whole is not None:
            return [self._cut(whole, missing)]
        pieces = []
        index = 0
        while index < len(self.free) and missing:
            if self.free[index].num_bytes < self.min_piece:
                index += 1
                continue
            pieces.append(self._cut(index, min(self.free[index].num_bytes, missing)))
            missing -= pieces[-1].num_bytes
        if missing:
            pieces.append(self._new_block(missing))
        return pieces

    def give(self, pieces: Iterable[Piece]) -> None:
        """Take ``pieces`` back; from any thread, and from the end of an object within :meth:`take`."""
        self._returned.extend(pieces)

    def tensors(self, pieces: Iterable[Piece], num_bytes: int) -> list[Tensor]:
        """The first ``num_bytes`` of the pieces, one tensor of bytes each."""
        tensors = []
        for piece in pieces:
            size = min(piece.num_bytes, num_bytes)
            tensors.append(self.blocks[piece.block].data[piece.start : piece.start + size])
            num_bytes -= size
        return tensors

    def close(self) -> None:
        """Unpin all blocks.  No copy may be under way."""
        for block in self.blocks:
            block.close()

    def _cut(self, index: int, num_bytes: int) -> Piece:
        """Take the first bytes of the free piece at ``index``."""
        block, start, end = self.free[index]
        if start + num_bytes == end:
            return self.free.pop(index)
        self.free[index] = Piece(block, start + num_bytes, end)
        return Piece(block, start, start + num_bytes)

    def _add(self, piece: Piece) -> None:
        """Add a free piece, joined with its neighbours."""
        insort(self.free, piece)
        index = self.free.index(piece)
        for left in (index, index - 1):
            if left < 0 or left + 1 >= len(self.free):
                continue
            one, other = self.free[left : left + 2]
            if (one.block, one.end) == (other.block, other.start):
                self.free[left : left + 2] = [Piece(one.block, one.start, other.end)]

    def _new_block(self, num_bytes: int) -> Piece:
        try:
            block = self.memory(num_bytes, self.registration)
        except OSError as error:
            raise torch.OutOfMemoryError(
                f"activation_checkpointing.offload=true: {num_bytes:,} more bytes of host memory: {error.strerror}"
            ) from error
        self.blocks.append(block)
        if block.refusal is not None and not self._is_refusal_reported:
            self._is_refusal_reported = True
            log.warning(
                "activation_checkpointing.offload=true: host memory could not be pinned (%s); the step waits for each "
                "copy; free host memory, or raise the limit of locked memory (ulimit -l)", block.refusal,
            )  # fmt: skip
        return Piece(len(self.blocks) - 1, 0, num_bytes)
