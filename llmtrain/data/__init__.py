"""Token sequences for training and validation.

The stages: documents (text, or Python's own, ``sources/``) -> tokenised once, in parallel, into shards in a cache
(``cache/``) -> every file compared with its sha256 (``cache/integrity.py``) -> cut into sequences of
``sequence_length`` (``sequences.py``) -> visited in an order that is computed, not stored (``order/``) -> batches made
in advance by a thread (``loader.py``), which reads the shards by position (``cache/token_reader.py``).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from llmtrain.base.options import Option
from llmtrain.data.batch import IGNORE as IGNORE
from llmtrain.data.batch import Batch as Batch
from llmtrain.data.batch import Collate as Collate
from llmtrain.data.batch import Count as Count
from llmtrain.data.batch import padded as padded
from llmtrain.data.cache.token_reader import DataError as DataError
from llmtrain.data.sequences import Outline as Outline
from llmtrain.data.sequences import Rows as Rows
from llmtrain.data.sequences import Sequences
from llmtrain.data.sources.search import LeftOut
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """The data of a run, built by ``data=...``."""

    train: Sequences
    validation: Sequences | None  # None where no data are set aside
    description: str  # one line for the run's header: documents, tokens, source
    fingerprint: str  # changes whenever the sequences do; a run resumes on the data that it was started with
    labels: tuple[str, ...] = ()  # names of the classes, in data for classification
    class_weights: tuple[float, ...] = ()  # the weight of an example of each class; (): all the same
    label_counts: tuple[int, ...] = ()  # training examples of each class
    notes: tuple[str, ...] = ()  # messages about text that was cut, and rows left out
    left_out: tuple[LeftOut, ...] = ()  # the files that are not read
    split: str = ""  # one line for the run's header: the text that validates; "": nothing is known of it


class DataConfig(Option, ABC):
    """Contract of ``data=...``."""

    gives: ClassVar[str] = "text"  # the targets: text (every next token) | responses (their tokens alone) | labels
    sequence_length: int
    shuffle: bool

    @property
    def packs(self) -> bool:
        """True if a row holds several examples, each with attention to itself alone."""
        return False

    @abstractmethod
    def build(self, tokenizer: Tokenizer) -> Corpus:
        """Prepare (or find in the cache), check and open the data.

        Raises ValueError with the path and the remedy, :class:`DataError` for text that cannot be tokenised.
        """

    def verify(self, tokenizer: Tokenizer) -> Corpus:
        """Build the data as :meth:`build` does, but read and check every byte again, and repair nothing.

        The fingerprint is that of the data as they are now.  Raises ValueError naming a damaged file, or one
        whose bytes have changed while its size and modification time have not.
        """
        return self.build(tokenizer)
