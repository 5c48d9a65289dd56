"""The batch: the tensors of some sequences, and the counts by which their losses are divided."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.base.constants import IGNORE as IGNORE
from llmtrain.data.sequences import Outline, Rows

PADDING_MULTIPLE = 64  # rows are padded to multiples of it: few shapes, for the kernels and for torch.compile
SHORTEST_COMPILED = 32  # tokens of the shortest rows that code is compiled for
SHORT_MULTIPLE = 8  # short rows are padded to multiples of this, or they would be mostly padding


def padded(length: int, longest: int) -> int:
    """The padded length of rows of at most ``length`` tokens; ``longest`` is the limit."""
    multiple = SHORT_MULTIPLE if length <= PADDING_MULTIPLE else PADDING_MULTIPLE
    return min(-(-length // multiple) * multiple, longest)


def widened(length: int, longest: int) -> int:
    """The length that compiled code runs rows of ``length`` tokens at: the next power of 2, or three quarters of it.

    Ten lengths up to 1,024 where :func:`padded` has 23, for a tenth more tokens on average.
    """
    power = max(1 << (length - 1).bit_length(), SHORTEST_COMPILED)
    three_quarters = 3 * power // 4
    return min(three_quarters if length <= three_quarters and power > PADDING_MULTIPLE else power, longest)


def part_of(sequences: int, rank: int, of: int) -> tuple[int, int]:
    """Begin and end of the part of ``rank`` among ``of`` ranks that share ``sequences``."""
    return sequences * rank // of, sequences * (rank + 1) // of


@dataclass(frozen=True)
class Batch:
    """Sequences of an optimizer step, or a part of them.

    ``counts`` and ``tokens`` are those of the whole step, of all micro-batches and all ranks, and every part keeps
    them: a loss is (the sum over a part) / (the count of the step), so that any split of a step adds up to the same.
    """

    tensors: Mapping[str, Tensor]  # by name; the first dimension is the sequence's number
    counts: Mapping[str, float]  # of each loss: valid targets, or the sum of their weights; counted on the host
    tokens: int  # inputs that are not padding
    lengths: Mapping[str, tuple[int, ...]]  # of tensors padded along their second dimension: tokens of each row
    spans: tuple[int, ...] = ()  # of the whole step, as ``tokens``: see :attr:`llmtrain.data.Rows.spans`
    step_sequences: int = 0  # of the whole step, in the part of a rank; 0: this batch is the whole step
    is_filler: bool = False  # True: these sequences stand for a part that has none, and their losses count nothing

    @property
    def sequences(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, begin: int, end: int) -> "Batch":
        """The part that holds the sequences from ``begin`` up to ``end``, padded no further than it needs."""
        tensors, lengths = {}, {name: values[begin:end] for name, values in self.lengths.items()}
        for name, tensor in self.tensors.items():
            part = tensor[begin:end]
            if name in lengths:
                part = part[:, : padded(max(lengths[name], default=1), tensor.shape[1])]
            tensors[name] = part
        return replace(self, tensors=tensors, lengths=lengths)

    def widen(self, longest: int) -> "Batch":
        """The same rows padded to one of few lengths, for code that is compiled for each; at most ``longest``."""
        tensors = dict(self.tensors)
        for name in self.lengths:
            missing = widened(tensors[name].shape[1], longest) - tensors[name].shape[1]
            if missing > 0:
                tensors[name] = F.pad(tensors[name], (0, missing), value=IGNORE if name == "targets" else 0)
        return replace(self, tensors=tensors)

    def split(self, size: int) -> Iterator["Batch"]:
        """Parts of ``size`` sequences each, in order; the last may be smaller."""
        for begin in range(0, self.sequences, size):
            yield self.rows(begin, begin + size)

    def shard(self, rank: int, of: int) -> "Batch":
        """The part of ``rank`` among ``of`` ranks: consecutive sequences, as evenly as their number allows.

        A rank for which there is none has a :meth:`filler`.
        """
        begin, end = part_of(self.sequences, rank, of)
        part = self.rows(begin, end) if begin < end else self.filler()
        return replace(part, step_sequences=self.step_sequences or self.sequences)

    def filler(self) -> "Batch":
        """A sequence of this batch whose losses count nothing, for a rank that would have no micro-batch."""
        return replace(self.rows(0, 1), is_filler=True)

    def largest_part(self, ranks: int) -> int:
        """The number of sequences of the rank that has the most, where ``ranks`` divide the step."""
        return -(-self.step_sequences // ranks) if self.step_sequences else self.sequences

    def map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with ``move`` applied to each tensor."""
        return replace(self, tensors={name: move(tensor) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> "Batch":
        return self.map(lambda tensor: tensor.to(device))


Collate = Callable[[Rows, np.ndarray, int], Batch]  # (sequences, their positions, seed) -> batch
Count = Callable[[Outline], Mapping[str, float] | None]  # the counts of a batch; None: only its collation counts
