"""Token sequences for training and validation.

The chain: documents (text, or Python's own) -> tokenised once, in parallel, into shards in a cache (``cache.py``) ->
every file compared with its sha256 (``integrity.py``) -> cut into sequences of ``sequence_length``
(``sequences.py``) -> visited in an order that is computed, not stored (``order.py``) -> batches made ahead of need by
a thread (``loader.py``), which reads the shards by position (``reader.py``).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from llmtrain.base.options import Option
from llmtrain.data.batch import IGNORE as IGNORE
from llmtrain.data.batch import Batch as Batch
from llmtrain.data.batch import padded as padded
from llmtrain.data.cache.token_reader import DataError as DataError
from llmtrain.data.sequences import Rows as Rows
from llmtrain.data.sequences import Sequences
from llmtrain.tokenizer import Tokenizer


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
