"""Scores of predicted classes: accuracy, precision, recall, F1 and the confusion matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ClassScore(NamedTuple):
    """The scores of one class; None where there is nothing to divide by."""

    label: str
    texts: int  # that have it
    precision: float | None  # of the texts for which it was predicted, the share that has it
    recall: float | None  # of the texts that have it, the share for which it was predicted
    f1: float | None  # 2 · hits / (2 · hits + false alarms + misses)


class ClassScores:
    """A count of true and predicted classes; a text has one of each, or any number with ``multi_label``."""

    def __init__(self, labels: Sequence[str], *, multi_label: bool) -> None:
        self.labels, self.multi_label = tuple(labels), multi_label
        self.number = {label: number for number, label in enumerate(labels)}
        self.texts = self.right = 0
        self.confusion = np.zeros((len(labels), len(labels)), np.int64)  # true × predicted; without ``multi_label``
        self._counts = np.zeros((len(labels), 3), np.int64)  # hits, false alarms, misses

    def add(self, truth: Sequence[str], predicted: Sequence[str]) -> None:
        """Count one text."""
        self.texts += 1
        self.right += set(truth) == set(predicted)
        if not self.multi_label:
            self.confusion[self.number[truth[0]], self.number[predicted[0]]] += 1
        for label in {*truth, *predicted}:
            column = 0 if label in truth and label in predicted else 1 if label in predicted else 2
            self._counts[self.number[label], column] += 1

    @property
    def accuracy(self) -> float:
        """The share of texts with all of their classes right."""
        return self.right / max(self.texts, 1)

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that occur or were predicted."""
        found = [score.f1 for score in self.by_class() if score.f1 is not None]
        return sum(found) / max(len(found), 1)

    def by_class(self) -> list[ClassScore]:
        """The scores of each class, in the order of the labels."""
        found = []
        for label, (hits, alarms, misses) in zip(self.labels, self._counts.tolist(), strict=True):
            precision = hits / (hits + alarms) if hits + alarms else None
            recall = hits / (hits + misses) if hits + misses else None
            f1 = 2 * hits / (2 * hits + alarms + misses) if hits + alarms + misses else None
            found.append(ClassScore(label, hits + misses, precision, recall, f1))
        return found
