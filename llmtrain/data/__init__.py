"""Token sequences for training and validation.

The chain: documents (text, or Python's own) -> tokenised once, in parallel, into shards in a cache (``cache.py``) ->
every file compared with its sha256 (``integrity.py``) -> cut into sequences of ``sequence_length``
(``sequences.py``) -> visited in an order that is computed, not stored (``order.py``) -> batches made ahead of need by
a thread (``loader.py``), which reads the shards by position (``reader.py``).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmtrain.base.options import Option
from llmtrain.data.cache.token_reader import DataError as DataError
from llmtrain.data.sequences import Sequences
from llmtrain.tokenizer import Tokenizer

IGNORE = -100  # a target that carries no loss; torch's default ``ignore_index``
PADDING_MULTIPLE = 64  # rows are padded to multiples of it: few shapes, for the kernels and for torch.compile
SHORT_MULTIPLE = 8  # … and short ones, of which that would make mostly padding, to multiples of this


def padded(length: int, longest: int) -> int:
    """To how many tokens rows of at most ``length`` are padded, ``longest`` being the most there can be."""
    multiple = SHORT_MULTIPLE if length <= PADDING_MULTIPLE else PADDING_MULTIPLE
    return min(-(-length // multiple) * multiple, longest)


@dataclass(frozen=True)
class Batch:
    """Sequences of one optimizer step (or a slice of them)."""

    inputs: torch.Tensor  # (batch, sequence) int64
    targets: torch.Tensor  # (batch, sequence) int64; IGNORE where there is nothing to predict
    num_targets: int  # targets that are not IGNORE, counted before the batch went to the device
    num_tokens: int  # inputs that are not padding
    segments: torch.Tensor | None = None  # (batch, sequence) int32, as in ``Rows``: attention stays within an example
    lengths: tuple[int, ...] | None = None  # tokens of each row before its padding; None: nothing is padded

    def split(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Inputs, targets and segments of ``size`` sequences at a time, padded no further than they need."""
        for start in range(0, len(self.inputs), size):
            rows = slice(start, start + size)
            columns = slice(None if self.lengths is None else padded(max(self.lengths[rows]), self.inputs.shape[1]))
            segments = None if self.segments is None else self.segments[rows, columns]
            yield self.inputs[rows, columns], self.targets[rows, columns], segments


@dataclass(frozen=True)
class Corpus:
    """What ``data=...`` builds."""

    train: Sequences
    validation: Sequences | None  # None where the option was told to keep nothing aside
    description: str  # one line for the run's header: documents, tokens, where from
    fingerprint: str  # changes whenever the sequences do; a run resumes on the data that it was started with
    labels: tuple[str, ...] = ()  # names of the classes, where there are classes to be told apart
    class_weights: tuple[float, ...] = ()  # what an example of each class counts; (): all the same
    label_counts: tuple[int, ...] = ()  # training examples of each class
    notes: tuple[str, ...] = ()  # what was left out or cut, for the user to know


class DataConfig(Option, ABC):
    """Contract of ``data=...``."""

    gives: ClassVar[str] = "text"  # what the targets are: text (every next token) | responses (those of some) | labels
    sequence_length: int
    shuffle: bool

    @property
    def packs(self) -> bool:
        """Whether a row holds several examples, each with attention to itself alone."""
        return False

    @abstractmethod
    def build(self, tokenizer: Tokenizer) -> Corpus:
        """Prepare (or find in the cache), check and open the data.

        Raises ValueError with the path and the remedy, :class:`DataError` for text that cannot be tokenised.
        """

    def verify(self, tokenizer: Tokenizer) -> Corpus:
        """As ``build``, but every byte is read again, whatever is remembered of it, and nothing damaged is mended.

        The fingerprint is that of the data as they are now.  Raises ValueError naming the file that is damaged, or
        whose bytes have changed while its size and modification time have not.
        """
        return self.build(tokenizer)
