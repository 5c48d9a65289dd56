"""``llmtrain predict RUN``: classes and their probabilities for a text, or for each row of a file."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.base.checks import check_input, positive, unicode_text
from llmtrain.base.format import counted, percent, visible
from llmtrain.base.invocation import FINISHED, Invocation
from llmtrain.base.outputs import check_output, is_stdout, is_stream, open_output
from llmtrain.data import padded
from llmtrain.data.labelled import LabelledText
from llmtrain.data.sources.documents import read_text
from llmtrain.data.sources.records import Record, RecordReader, find_records
from llmtrain.evaluation.class_scores import ClassScores
from llmtrain.objective.classification import MAX_MATRIX, Classification, ClassifierUnit
from llmtrain.report.table import confusion_table
from llmtrain.run.load import InferenceSettings, LoadedModel

WINDOW = 64  # batches that are read ahead, so that texts of similar length share a batch
FORMATS = (".jsonl", ".csv")
T = TypeVar("T")


@dataclass(frozen=True)
class Predict(InferenceSettings):
    """The settings of ``conf/predict.yaml``."""

    text: str | None
    file: str | None
    text_column: str | None
    label_column: str | None
    output: str | None
    threshold: float
    batch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        unicode_text(text=self.text)
        positive(batch_size=self.batch_size)
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold:g}: must be a probability, above 0 and below 1")
        if self.text is None and self.file is None:
            raise ValueError('text=null and file=null: give one of them, as in text="…" or file=messages.csv')
        if self.text is not None and self.file is not None:
            raise ValueError(f"text={self.text!r} and file={self.file}: give one of them, not both")
        if self.file is not None:
            check_input("file", self.file)
        if self.output is not None:
            if self.file is None:
                raise ValueError(f"output={self.output}: is for file=…; the classes of one text are printed")
            path = Path(self.output)
            if path.suffix not in FORMATS and not is_stream(self.output):
                raise ValueError(f"output={self.output}: the name has to end in {' or '.join(FORMATS)}")
            check_output("output", self.output)


def main(settings: Predict, invocation: Invocation) -> int:
    """Print the classes of one text; or write a row for each of a file's, into ``output`` or to standard output."""
    with settings.load(invocation.targets[0]) as trained:
        predictor = Predictor.of(trained, settings.threshold, invocation.targets[0])
        if settings.text is not None:
            show(predictor, settings.text)
        else:
            predict_file(predictor, settings)
    return FINISHED


@dataclass(frozen=True)
class Predictor:
    """A classifier, its tokenizer and its labels."""

    trained: LoadedModel
    data: LabelledText
    unit: ClassifierUnit
    labels: tuple[str, ...]
    threshold: float  # with several labels a text: the least probability of a predicted label

    @classmethod
    def of(cls, trained: LoadedModel, threshold: float, target: Path) -> "Predictor":
        """The predictor of a loaded model.  Raises ValueError for a run that was not trained to classify."""
        run = trained.run
        if not isinstance(run.objective, Classification) or not isinstance(run.data, LabelledText):
            raise ValueError(
                f"{target}: this run was not trained to classify texts (objective=classification); "
                "llmtrain generate and llmtrain chat take runs that write text"
            )
        assert isinstance(trained.unit, ClassifierUnit)
        return cls(trained, run.data, trained.unit, tuple(trained.state.labels), threshold)

    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """The probability of each class ``(texts, classes)``, fp32, on the host; all texts at once."""
        encode = self.data.encoder(self.trained.tokenizer)
        ids = [encode(text).inputs for text in texts]
        if empty := [text for text, of_text in zip(texts, ids, strict=True) if not len(of_text)]:
            raise ValueError(f"text={empty[0]!r}: the tokenizer makes no token of it, so it has no class")
        width = padded(max(map(len, ids)), self.data.sequence_length)
        inputs = np.zeros((len(ids), width), np.int64)
        for row, of_text in zip(inputs, ids, strict=True):
            row[: len(of_text)] = of_text
        last = torch.tensor([len(of_text) - 1 for of_text in ids], device=self.trained.device)
        with torch.no_grad(), self.trained.precision.autocast():
            found = self.unit.probabilities(torch.from_numpy(inputs).to(self.trained.device), last)
        return found.float().cpu()

    def decide(self, probabilities: Sequence[float]) -> list[str]:
        """The likeliest class; with several labels a text, those from the threshold on."""
        if self.unit.multi_label:
            return [label for label, p in zip(self.labels, probabilities, strict=True) if p >= self.threshold]
        return [self.labels[int(np.argmax(probabilities))]]


def show(predictor: Predictor, text: str) -> None:
    """Print the classes of ``text``, the likeliest first."""
    if not text.strip():
        raise ValueError(f"text={text!r}: an empty text has no class; give a text")
    found = predictor.probabilities([text])[0].tolist()
    decided = predictor.decide(found)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for label, p in sorted(zip(predictor.labels, found, strict=True), key=lambda pair: -pair[1]):
        table.add_row(Text(visible(label), style="bold" if label in decided else "dim"), f"{p:.4f}")
    Console(highlight=False).print(table)


def predict_file(predictor: Predictor, settings: Predict) -> None:
    """Write a row for each row of the file, in its order; report the scores where the file has labels."""
    data = replace(
        predictor.data,
        text_column=settings.text_column or predictor.data.text_column,
        label_column=settings.label_column or predictor.data.label_column,
    )
    reader = FileReader(data)
    scores = ClassScores(predictor.labels, multi_label=predictor.unit.multi_label)
    unknown: Counter[str] = Counter()
    total = 0
    assert settings.file is not None
    with writer(settings.output, predictor.labels) as write:
        for window in batched(reader.read(settings.file), WINDOW * settings.batch_size):
            texts = [reader.text(record) for record in window]
            if settings.label_column is not None:
                window[0].value(settings.label_column, "label_column")
            probabilities: dict[int, list[float]] = {}
            for rows in batched(sorted(range(len(texts)), key=lambda row: len(texts[row])), settings.batch_size):
                found = predictor.probabilities([texts[row] for row in rows])
                probabilities |= dict(zip(rows, found.tolist(), strict=True))
            for row, record in enumerate(window):
                decided = predictor.decide(probabilities[row])
                write(record, decided, dict(zip(predictor.labels, probabilities[row], strict=True)))
                truth = reader.labels(record)
                if truth is not None and set(truth) <= set(predictor.labels):
                    scores.add(truth, decided)
                unknown.update(set(truth or ()) - set(predictor.labels))
                total += 1
    print(f"{counted(total, 'text')}{reader.skipped()}{_written(settings.output)}", file=sys.stderr)
    if unknown:
        names = ", ".join(f"{visible(name)} ({number:,})" for name, number in unknown.most_common(8))
        print(f"not scored, as the model has no such label: {names}", file=sys.stderr)
    if scores.texts:
        show_scores(scores)


class FileReader:
    """Reader of the texts of a file, and of their labels where it has them."""

    def __init__(self, data: LabelledText) -> None:
        self.data = data
        self.records = RecordReader()

    def read(self, file: str) -> Iterator[Record]:
        """The records of ``file``; of a .txt a line each, without the empty ones."""
        if Path(file).suffix != ".txt":
            yield from (record for path in find_records(file, "file") for record in self.records.read(path))
            return
        lines, number = "", 0
        for block in chain(read_text(Path(file).expanduser()), [None]):
            *whole, lines = (lines + block).split("\n") if block is not None else [lines, ""]
            for line in whole:
                number += 1
                if line.strip():
                    yield Record({self.data.text_column: line.rstrip("\r")}, f"{file}:{number}")
                elif block is not None:
                    self.records.blank += 1

    def text(self, record: Record) -> str:
        """The text of a record.  Raises ValueError, naming file and line, if there is none."""
        text = record.text(self.data.text_column, "text_column")
        if not text.strip():
            raise ValueError(f"{record.origin}: the text is empty; remove the row, or fill it in")
        return text

    def labels(self, record: Record) -> list[str] | None:
        """The labels of a record as in training; None where it has none."""
        if record.values.get(self.data.label_column) in (None, ""):
            return None
        return list(self.data.read(record).labels)

    def skipped(self) -> str:
        return f", {counted(self.records.blank, 'empty line')} skipped" if self.records.blank else ""


def _written(output: str | None) -> str:
    return "" if output is None else f", written to {output}"


def show_scores(scores: ClassScores) -> None:
    """Print accuracy, the scores of each class and the confusion matrix to standard error."""
    console = Console(highlight=False, stderr=True)
    accuracy = f"accuracy {percent(scores.accuracy)} ({scores.right:,} of {scores.texts:,} with a label)"
    console.print(Text(f"{accuracy}, macro-F1 {scores.macro_f1:.3f}"))
    table = Table("class", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("F1", "precision", "recall", "texts"):
        table.add_column(heading, justify="right")
    for each in scores.by_class():
        shares = ["-" if share is None else f"{share:.3f}" for share in (each.f1, each.precision, each.recall)]
        table.add_row(Text(visible(each.label), style="bold"), *shares, f"{each.texts:,}")
    console.print(table)
    if scores.multi_label or len(scores.labels) > MAX_MATRIX:
        return
    console.print(confusion_table(scores.labels, scores.confusion.tolist()))


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``, of which the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def writer(output: str | None, labels: Sequence[str]) -> Iterator[Any]:
    """A function that writes a row; a file gets its name once it is complete."""
    if output is None or is_stdout(output):
        yield _jsonl(sys.stdout)
        return
    with open_output("output", output) as file:
        yield _csv(file, labels) if Path(output).suffix == ".csv" else _jsonl(file)


def _jsonl(file: IO[str]) -> Any:
    def write(record: Record, decided: list[str], probabilities: Mapping[str, float]) -> None:
        label: Any = decided if len(decided) != 1 else decided[0]
        rounded = {name: round(p, 6) for name, p in probabilities.items()}
        row = {**record.values, "predicted": label, "probabilities": rounded}
        file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

    return write


def _csv(file: IO[str], labels: Sequence[str]) -> Any:
    rows = csv.writer(file)
    columns: list[str] = []

    def write(record: Record, decided: list[str], probabilities: Mapping[str, float]) -> None:
        if not columns:
            columns.extend(record.values)
            rows.writerow([*columns, "predicted", *(f"probability_{label}" for label in labels)])
        kept = [record.values.get(column, "") for column in columns]
        rows.writerow([*kept, "|".join(decided), *(f"{probabilities[label]:.6f}" for label in labels)])

    return write
