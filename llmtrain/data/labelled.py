"""Texts with labels, for classification."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from llmtrain.data.example_data import ExampleData
from llmtrain.data.example_format import EncodedExample, Example
from llmtrain.data.sources.records import Record, shown
from llmtrain.tokenizer import Tokenizer

SEPARATOR = "|"  # between several labels in one value
MAX_LABELS = 62  # of a text with several: a bit each in a target


class Balance(Enum):
    """The treatment of labels that are more frequent than others."""

    none = "nothing"
    undersample = "leave out training examples of frequent labels"
    weights = "weigh the loss of rare labels higher"


@dataclass(frozen=True)
class LabelledText(ExampleData[str]):
    """Records of a text and its label, or its labels with ``multi_label``.

    With ``append_end_of_text`` every text is followed by the end-of-text token, and its class is predicted there.  In a
    causal model only the last token has seen the whole text; with this setting it is the same token for every text, cut
    or not, instead of the word that a text happens to end with.
    """

    text_column: str
    label_column: str
    labels: list[str] | None
    multi_label: bool
    balance: Balance
    append_end_of_text: bool

    gives = "labels"
    cache_name: ClassVar[str] = "Labelled"
    noun: ClassVar[str] = "text"
    has_labels: ClassVar[bool] = True
    cut_remark: ClassVar[str] = "only their beginnings are read"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None:
            if len(set(self.labels)) < len(self.labels) or not self.labels:
                raise ValueError(f"labels={self.labels}: must name each class once; null takes those found")
            self._check_number(self.labels)
        if self.multi_label and self.balance is Balance.undersample:
            raise ValueError(
                "balance=undersample: a text with several labels cannot be left out for one of them; take weights"
            )
        least = 1 + self.append_end_of_text
        if self.sequence_length < least:
            raise ValueError(f"sequence_length={self.sequence_length}: must be at least {least}, with a token of text")

    # --- a record ---------------------------------------------------------------------------------------------------

    def read(self, record: Record) -> Example[str]:
        text = record.text(self.text_column, "data.text_column")
        if not text.strip():
            raise ValueError(f"{record.origin}: {self.text_column} is empty; remove the line, or fill it in")
        value = record.value(self.label_column, "data.label_column")
        labels = self._several(value, record.origin) if self.multi_label else (self._one(value, record.origin),)
        read = (self.text_column, self.label_column)
        unread = [name for name, value in record.values.items() if name not in read and value not in (None, "")]
        return Example(text, (text,), labels, unread=tuple(unread))

    def _one(self, value: Any, origin: str) -> str:
        if isinstance(value, str | int):
            if not (label := str(value).strip()):
                raise ValueError(f"{origin}: {self.label_column} is empty; remove the line, or fill it in")
            return label
        hint = "; with data.multi_label=true a text can have several" if isinstance(value, list) else ""
        raise ValueError(f"{origin}: {self.label_column} is {shown(value)}, where a label is needed{hint}")

    def _several(self, value: Any, origin: str) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [part for part in value.split(SEPARATOR) if part.strip()]
        elif not isinstance(value, list):
            raise ValueError(
                f"{origin}: {self.label_column} is {shown(value)}, where a list of labels is needed, or several with "
                f"{SEPARATOR!r} between them"
            )
        return tuple(sorted({self._one(each, origin) for each in value}))

    # --- its label --------------------------------------------------------------------------------------------------

    @property
    def min_labels(self) -> int:
        return 1 if self.multi_label else 2

    def undersamples(self) -> bool:
        return self.balance is Balance.undersample

    def name_labels(self, found: Sequence[str]) -> list[str]:
        names = list(found) if self.labels is None else self.labels
        self._check_number(names)
        return names

    def _check_number(self, names: Sequence[str]) -> None:
        if self.multi_label and len(names) > MAX_LABELS:
            raise ValueError(
                f"multi_label=true: {len(names)} labels, and a target has room for {MAX_LABELS}; drop rare ones"
            )

    def label_of(self, names: Sequence[str], numbers: dict[str, int]) -> int:
        if self.multi_label:
            return sum(1 << numbers[name] for name in names)
        return super().label_of(names, numbers)

    def count(self, targets: np.ndarray, classes: int) -> tuple[int, ...]:
        if not self.multi_label:
            return super().count(targets, classes)
        return tuple(int((targets >> bit & 1).sum()) for bit in range(classes))

    def class_weights(self, counts: Sequence[int]) -> tuple[float, ...]:
        """``balance=weights``: weights inverse to the frequency, 1 on average over the training texts."""
        if self.balance is not Balance.weights:
            return ()
        total = sum(counts)
        return tuple(total / (len(counts) * max(number, 1)) for number in counts)

    # --- its ids ----------------------------------------------------------------------------------------------------

    def encoder(self, tokenizer: Tokenizer) -> Callable[[str], EncodedExample]:
        begin = list(tokenizer.begin)
        end = [tokenizer.end_of_text] if self.append_end_of_text else []
        room = self.sequence_length - len(begin) - len(end)
        before, behind = np.array(begin, np.uint32), np.array(end, np.uint32)

        def encode(text: str) -> EncodedExample:
            ids = tokenizer.encode(text)
            return EncodedExample(np.concatenate([before, ids[:room], behind]), None, len(ids) > room)

        return encode

    def settings(self, tokenizer: Tokenizer) -> list[Any]:
        return [
            self.text_column, self.label_column, self.labels, self.multi_label, self.undersamples(),
            self.append_end_of_text,
        ]  # fmt: skip
