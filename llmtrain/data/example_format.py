"""The contract of data made of examples: how a record becomes an example, and an example token ids."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from llmtrain.data.sources.records import Record
from llmtrain.tokenizer import Tokenizer

T = TypeVar("T")


class Example(NamedTuple, Generic[T]):
    """A record that has been checked."""

    value: T  # given to the encoder
    texts: tuple[str, ...]  # two examples with the same texts are duplicates
    labels: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()  # columns of the record that have a value and that nothing reads
    remarks: tuple[str, ...] = ()  # on what was left out of it, for the user
    is_new: bool = False  # an earlier version made another example of it


class EncodedExample(NamedTuple):
    """An example as token ids."""

    inputs: np.ndarray  # (tokens,)
    targets: np.ndarray | None  # (tokens,) int64, IGNORE where there is none; None: the label, at the last token
    is_cut: bool  # it was longer than the limit
    spans_border: bool = False  # a token is partly a target and partly not
    remarks: tuple[str, ...] = ()  # on what was left out of it, for the user
    is_new: bool = False  # an earlier version encoded it otherwise


class ExampleFormat(ABC, Generic[T]):
    """Base of the options whose data are examples: the part that each option defines."""

    path: str
    validation_path: str | None
    validation_fraction: float
    sequence_length: int

    cache_name: ClassVar[str]  # part of the cache key, so it must never change: a run resumes on the data of its key
    noun: ClassVar[str] = "example"
    cut_remark: ClassVar[str] = "their ends were cut"
    dropped_remark: ClassVar[str] = "nothing was left"
    has_labels: ClassVar[bool] = False

    @property
    def min_labels(self) -> int:
        """Distinct labels that the training examples need."""
        return 0

    @abstractmethod
    def read(self, record: Record) -> Example[T]:
        """The example in ``record``.  Raises ValueError, naming file and line, for a record that holds none."""

    @abstractmethod
    def encoder(self, tokenizer: Tokenizer) -> Callable[[T], EncodedExample]:
        """A function that encodes examples, called from several threads.  An example without inputs is left out."""

    @abstractmethod
    def settings(self, tokenizer: Tokenizer) -> list[Any]:
        """All settings that decide how examples are read and encoded, as JSON-ready values."""

    def new_settings(self) -> list[Any]:
        """Settings that decide the same, and that no earlier version had: they are not in older fingerprints."""
        return []

    def remarks(self, tokenizer: Tokenizer) -> list[str]:
        """Remarks for the user on the settings with this tokenizer."""
        return []

    def border_notes(self, spanning: int, read: int) -> list[str]:
        """Notes on the ``spanning`` of ``read`` training examples in which a token spans a border of what is trained.

        Raises ValueError if they are most of them.
        """
        return []

    def undersamples(self) -> bool:
        """True if frequent labels are cut down to the number of the rarest."""
        return False

    def name_labels(self, found: Sequence[str]) -> list[str]:
        """The classes in their order, from those ``found`` in the training examples."""
        return list(found)

    def label_of(self, names: Sequence[str], numbers: dict[str, int]) -> int:
        """The target of an example with the classes ``names``, from the ``numbers`` of all classes."""
        return numbers[names[0]] if names else 0

    def count(self, targets: np.ndarray, classes: int) -> tuple[int, ...]:
        """Examples of each class."""
        return tuple(np.bincount(targets, minlength=classes).tolist())

    def class_weights(self, counts: Sequence[int]) -> tuple[float, ...]:
        """The weight of each class in the loss; (): all the same."""
        return ()
