"""Token sequences for training and validation.

The chain: documents (text, or Python's own) -> tokenised once, in parallel, into shards in a cache (``cache.py``) ->
every file compared with its sha256 (``integrity.py``) -> cut into sequences of ``sequence_length``
(``sequences.py``) -> visited in an order that is computed, not stored (``order.py``) -> batches made ahead of need by
a thread (``loader.py``), which reads the shards by position (``reader.py``).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from llmtrain.data.reader import DataFailed as DataFailed
from llmtrain.data.sequences import Sequences
from llmtrain.tokenizer import Tokenizer

IGNORE = -100  # a target that carries no loss; torch's default ``ignore_index``


@dataclass(frozen=True)
class Batch:
    """Sequences of one optimizer step (or a slice of them)."""

    inputs: torch.Tensor  # (batch, sequence) int64
    targets: torch.Tensor  # (batch, sequence) int64; IGNORE where there is nothing to predict
    num_targets: int  # targets that are not IGNORE, counted before the batch went to the device


@dataclass(frozen=True)
class Corpus:
    """What ``data=...`` builds."""

    train: Sequences
    validation: Sequences | None  # None where the option was told to keep nothing aside
    description: str  # one line for the run's header: documents, tokens, where from
    fingerprint: str  # changes whenever the sequences do; a run resumes on the data that it was started with


class DataConfig(ABC):
    """Contract of ``data=...``."""

    sequence_length: int
    shuffle: bool

    @abstractmethod
    def build(self, tokenizer: Tokenizer) -> Corpus:
        """Prepare (or find in the cache), check and open the data.

        Raises ValueError with the path and the remedy, :class:`DataFailed` for text that cannot be tokenised.
        """

    def verify(self, tokenizer: Tokenizer) -> Corpus:
        """As ``build``, but every byte is read again, whatever is remembered of it, and nothing damaged is mended.

        The fingerprint is that of the data as they are now.  Raises ValueError naming the file that is damaged, or
        whose bytes have changed while its size and modification time have not.
        """
        return self.build(tokenizer)
