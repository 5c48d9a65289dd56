"""The sum of a tensor over ranks, exchanged in few bits and added up in fp32: the same bits on every rank."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.distributed.local_sgd import BLOCK, SCALE_BYTES, Exchange

LARGEST_CODE = 127


def exchange_of(form: Exchange, ranks: dist.ProcessGroup) -> "Sum":
    """The sum over ``ranks`` in the format ``form``."""
    if form is Exchange.fp32:
        return PlainSum(ranks)
    return CompressedSum(ranks, Bf16() if form is Exchange.bf16 else Int8())


class Sum(ABC):
    """A sum over ``ranks``."""

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        self.ranks = ranks
        self.size = dist.get_world_size(ranks)

    @abstractmethod
    def begin(self, flat: Tensor) -> Callable[[], Tensor]:
        """Start to sum ``flat`` ``(elements,)``, fp32, which may be overwritten; the result's call returns the sum."""

    @abstractmethod
    def sent_bytes(self, elements: int) -> float:
        """Bytes that a rank sends for a sum of so many elements, by a ring."""


class PlainSum(Sum):
    """One all-reduce in fp32."""

    def begin(self, flat: Tensor) -> Callable[[], Tensor]:
        work = dist.all_reduce(flat, group=self.ranks, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return flat

        return finish

    def sent_bytes(self, elements: int) -> float:
        return 2 * (self.size - 1) / self.size * elements * 4


class Code(ABC):
    """A format of numbers in bytes; ``multiple``: numbers that are encoded together."""

    multiple: int = 1

    @abstractmethod
    def encode(self, numbers: Tensor) -> Tensor:
        """Encode ``numbers`` ``(parts, elements)``, fp32, as ``(parts, bytes)``; each part by itself."""

    @abstractmethod
    def decode(self, data: Tensor) -> Tensor:
        """The inverse of :meth:`encode`, up to rounding."""

    @abstractmethod
    def num_bytes(self, elements: int) -> int:
        """Bytes of so many numbers, a multiple of ``multiple``."""


class Bf16(Code):
    """Rounded to bf16."""

    def encode(self, numbers: Tensor) -> Tensor:
        return numbers.bfloat16().view(torch.uint8)

    def decode(self, data: Tensor) -> Tensor:
        return data.view(torch.bfloat16).float()

    def num_bytes(self, elements: int) -> int:
        return 2 * elements


class Int8(Code):
    """Whole numbers from -127 to 127, to the nearest, times the scale of their block: its largest number / 127."""

    multiple = BLOCK

    def encode(self, numbers: Tensor) -> Tensor:
        blocks = numbers.view(len(numbers), -1, BLOCK)
        scales = blocks.abs().amax(-1, keepdim=True) / LARGEST_CODE
        codes = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
        data = torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=-1)
        return data.view(len(numbers), -1)

    def decode(self, data: Tensor) -> Tensor:
        blocks = data.view(len(data), -1, BLOCK + SCALE_BYTES)
        codes, scales = blocks.split([BLOCK, SCALE_BYTES], dim=-1)
        numbers = codes.view(torch.int8).float() * scales.contiguous().view(torch.float32)
        return numbers.view(len(data), -1)

    def num_bytes(self, elements: int) -> int:
        return elements // BLOCK * (BLOCK + SCALE_BYTES)


class CompressedSum(Sum):
    """A sum in two exchanges, of codes: each rank adds up one part in fp32, and sends the sum to all.

    (An all-reduce of the codes' own type would round at every addition.)  What a rank adds up and keeps are the decoded
    numbers, its own included, so that all ranks have the same bits.
    """

    def __init__(self, ranks: dist.ProcessGroup, code: Code) -> None:
        super().__init__(ranks)
        self.code = code

    def _part(self, elements: int) -> int:
        """Elements of a rank's part."""
        multiple = self.size * self.code.multiple
        return -(-elements // multiple) * self.code.multiple

    def begin(self, flat: Tensor) -> Callable[[], Tensor]:
        elements, part = len(flat), self._part(len(flat))
        padded = torch.nn.functional.pad(flat, (0, self.size * part - elements))
        own = self.code.encode(padded.view(self.size, part))
        received = torch.empty_like(own)
        work = dist.all_to_all_single(received, own, group=self.ranks, async_op=True)

        def finish() -> Tensor:
            work.wait()
            total = self.code.encode(self.code.decode(received).sum(0, keepdim=True))
            totals = torch.empty_like(own)
            dist.all_gather(list(totals.unbind()), total[0], group=self.ranks)
            return self.code.decode(totals).view(-1)[:elements]

        return finish

    def sent_bytes(self, elements: int) -> float:
        return 2 * (self.size - 1) * self.code.num_bytes(self._part(elements))
