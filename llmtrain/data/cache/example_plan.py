"""First pass over files of records: check every record, and decide which examples train and which validate."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.base.checks import did_you_mean
from llmtrain.base.format import percent
from llmtrain.data.example_format import ExampleFormat
from llmtrain.data.order.validation_split import content_hash, set_aside, to_column, undersample
from llmtrain.data.sources.files import Stamp, stamp
from llmtrain.data.sources.records import Record, RecordReader

MOST_COLUMNS = 12  # that a note names
TRAIN, VALIDATION, LEFT_OUT = 0, 1, 2  # the purpose of an example


@dataclass(frozen=True)
class ExampleFiles:
    """The files of records, in order: first those for training, then those for validation alone."""

    train: list[Path]
    validation: list[Path]
    stamps: list[Stamp]  # of all of them, taken before their content was hashed

    def records(self, reader: RecordReader) -> Iterator[tuple[int, Record]]:
        """All records, each with the purpose of its file.  Raises ValueError for a file that changes meanwhile."""
        purposes = [TRAIN] * len(self.train) + [VALIDATION] * len(self.validation)
        for file, purpose, before in zip(self.train + self.validation, purposes, self.stamps, strict=True):
            for record in reader.read(file):
                yield purpose, record
            if stamp(file) != before:
                raise ValueError(f"{file}: changed while it was read; start again when it is complete")


@dataclass
class ExamplePlan:
    """The purpose and the target of each record, in the order of the files."""

    purposes: np.ndarray  # int8: TRAIN, VALIDATION or LEFT_OUT
    labels: np.ndarray  # int64: the target
    names: list[str]  # of the labels
    notes: list[str] = field(default_factory=list)  # for the user
    is_new: bool = False  # an earlier version read other examples from the same files


def plan_examples(data: ExampleFormat[Any], files: ExampleFiles) -> ExamplePlan:
    """Check every record and decide its purpose.  Raises ValueError, naming file and line, for a bad one."""
    reader = RecordReader()
    hashes, labels, purposes = array("q"), array("q"), array("b")
    combinations: dict[tuple[str, ...], int] = {}  # the labels of an example: a number
    first: dict[tuple[int, str], str] = {}  # purpose and label: where the label is first found
    unread: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    is_new = False
    for purpose, record in files.records(reader):
        example = data.read(record)
        unread.update(example.unread)
        remarks.update(example.remarks)
        is_new |= example.is_new
        hashes.append(content_hash(example.texts))
        labels.append(combinations.setdefault(example.labels, len(combinations)))
        purposes.append(purpose)
        for label in example.labels:
            first.setdefault((purpose, label), record.origin)
    plan = ExamplePlan(
        np.frombuffer(purposes, np.int8).copy() if purposes else np.empty(0, np.int8), to_column(labels), []
    )
    if not (plan.purposes == TRAIN).any():
        raise ValueError(f"data.path={data.path}: there is no {data.noun} in it")
    plan.is_new = is_new
    _split(data, plan, to_column(hashes))
    if data.has_labels:
        _number_labels(data, plan, list(combinations), first)
    _report_duplicates(data, plan, to_column(hashes))
    plan.notes += reader.notes()
    plan.notes += count_notes(remarks, len(purposes), data.noun)
    if unread:
        columns = [f"{name} ({number:,})" for name, number in unread.most_common(MOST_COLUMNS)]
        more = f" and {len(unread) - MOST_COLUMNS:,} others" * (len(unread) > MOST_COLUMNS)
        plan.notes.append(f"columns that nothing reads, with their rows: {', '.join(columns)}{more}")
    return plan


def count_notes(remarks: Counter[str], total: int, noun: str) -> list[str]:
    """Notes on remarks, with the number of the examples that each is about."""
    return [f"{number:,} of {total:,} {noun}s: {remark}" for remark, number in sorted(remarks.items())]


def _split(data: ExampleFormat[Any], plan: ExamplePlan, hashes: np.ndarray) -> None:
    """Set examples aside for validation, and leave out those that a balance of labels excludes."""
    fraction = data.validation_fraction
    if data.validation_path is None and fraction > 0:
        plan.purposes[set_aside(hashes, plan.labels, fraction)] = VALIDATION
        if not (plan.purposes == VALIDATION).any():
            different = len(np.unique(hashes))
            equal = "" if different == len(hashes) else f", {different:,} of them different,"
            raise ValueError(
                f"data.validation_fraction={fraction}: {len(hashes):,} {data.noun}s{equal} make none for validation; "
                "take a larger fraction, or 0 for no validation"
            )
    if data.undersamples():
        train = np.flatnonzero(plan.purposes == TRAIN)
        left_out = train[~undersample(hashes[train], plan.labels[train])]
        plan.purposes[left_out] = LEFT_OUT
        if len(left_out):
            plan.notes.append(
                f"{len(left_out):,} of {len(train):,} training {data.noun}s were left out, so that all labels are "
                "as frequent as the rarest (data.balance=undersample)"
            )


def _number_labels(
    data: ExampleFormat[Any],
    plan: ExamplePlan,
    combinations: list[tuple[str, ...]],
    first: dict[tuple[int, str], str],
) -> None:
    """Name the classes, and turn the numbers of label combinations in ``plan`` into targets."""
    used = np.bincount(plan.labels[plan.purposes == TRAIN], minlength=len(combinations)) > 0
    trained = {label for labels, is_used in zip(combinations, used, strict=True) if is_used for label in labels}
    read = list(dict.fromkeys(label for _, label in first))
    plan.names = data.name_labels(sorted(read if data.validation_path is None else trained, key=_sort_key))
    numbers = {name: number for number, name in enumerate(plan.names)}
    for (purpose, label), origin in first.items():
        if purpose == VALIDATION and label not in trained:
            raise ValueError(
                f"{origin}: the label {label!r} occurs in the validation data alone, so the model cannot learn it; "
                f"the training data have {_few(sorted(trained, key=_sort_key))}; correct it, or add such texts to the "
                "training data"
            )
        if label not in numbers:
            raise ValueError(
                f"{origin}: the label {label!r} is none of data.labels{did_you_mean(label, numbers)}; these are "
                f"{_few(plan.names)}"
            )
    if len(trained) < data.min_labels:
        raise ValueError(
            f"data.path={data.path}: all training {data.noun}s have the label {_few(sorted(trained))}: "
            "there is nothing to classify; is data.label_column the right one?"
        )
    if unseen := [name for name in plan.names if name not in trained]:
        plan.notes.append(f"no training {data.noun} has the label {_few(unseen)}")
    targets = np.array([data.label_of(labels, numbers) for labels in combinations], np.int64)
    plan.labels = targets[plan.labels]


def _report_duplicates(data: ExampleFormat[Any], plan: ExamplePlan, hashes: np.ndarray) -> None:
    """Add notes on examples that occur several times."""
    train, validation = hashes[plan.purposes == TRAIN], hashes[plan.purposes == VALIDATION]
    unique = np.unique(train)
    if repeated := len(train) - len(unique):
        plan.notes.append(f"{repeated:,} of {len(train):,} training {data.noun}s are duplicates of others")
    if both := int(np.isin(validation, unique).sum()):
        plan.notes.append(
            f"{both:,} of {len(validation):,} validation {data.noun}s ({percent(both / len(validation))}) are "
            "training data too: their loss measures memorisation"
        )
    if data.has_labels:
        pairs = np.unique(np.stack([hashes, plan.labels]), axis=1)
        if differing := pairs.shape[1] - len(np.unique(hashes)):
            plan.notes.append(f"{differing:,} {data.noun}s occur with different labels")


def _sort_key(label: str) -> tuple[int, int, str]:
    """Numbers by their value, and before words."""
    digits = label.removeprefix("-")
    return (0, int(label), label) if digits.isascii() and digits.isdigit() else (1, 0, label)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return f"{shown}, …" if len(names) > 20 else shown
