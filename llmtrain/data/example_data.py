"""What the options for examples share: from files of records to a :class:`Corpus`.

The records are read twice, one at a time.  First each is checked, and the hash of its content and its label decide what
it is for; then it is encoded, on threads, into a cache as :mod:`llmtrain.data.cache.token_cache` keeps it.
"""

import logging
import time
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from llmtrain.base.checks import did_you_mean
from llmtrain.base.format import percent
from llmtrain.data import Corpus, DataConfig, DataError
from llmtrain.data.cache.document_encoder import dtype_of
from llmtrain.data.cache.example_cache import FORMAT, ExampleCacheEntry, ExampleIndex, digest_of
from llmtrain.data.cache.parallel_map import map_in_order
from llmtrain.data.cache.shard_index import ShardWriter
from llmtrain.data.cache.token_cache import REPORT_SECONDS, find_or_make
from llmtrain.data.examples import Examples, no_target
from llmtrain.data.order.validation_split import column, content_hash, set_aside, undersample
from llmtrain.data.sources.files import Stamp, remember, sha256, stamp
from llmtrain.data.sources.records import Record, RecordReader, find_records
from llmtrain.data.text_data import check_options
from llmtrain.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")
JOB = 128  # records that are encoded in one go
TRAIN, VALIDATION, LEFT_OUT = 0, 1, 2


class Example(NamedTuple, Generic[T]):
    """A record that has been checked."""

    what: T  # to be encoded
    content: tuple[str, ...]  # texts that make it the same as another
    labels: tuple[str, ...] = ()


class EncodedExample(NamedTuple):
    """An example as ids."""

    inputs: np.ndarray  # (tokens,)
    targets: np.ndarray | None  # (tokens,) int64, IGNORE where there is none; None: its label, at the last
    is_cut: bool  # whether it was longer than it may be


@dataclass
class ExamplePlan:
    """What the first reading has found out."""

    purposes: np.ndarray  # of each record, int8: TRAIN, VALIDATION or LEFT_OUT
    labels: np.ndarray  # of each record, int64: its target
    names: list[str]  # of the labels
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ExampleData(DataConfig, Generic[T]):
    """Base of the options whose data are examples in files of records."""

    path: str
    validation_path: str | None
    validation_fraction: float
    sequence_length: int
    shuffle: bool
    cache_dir: str

    def __post_init__(self) -> None:
        check_options(self.sequence_length, self.validation_fraction)

    # --- what an option says of itself -----------------------------------------------------------------------------

    cache_name: ClassVar[str]  # of the option in the key of the cache; a new one would make every run's data another's
    noun: ClassVar[str] = "example"
    cut_words: ClassVar[str] = "their ends were cut"
    dropped_words: ClassVar[str] = "nothing was left"
    has_labels: ClassVar[bool] = False

    @property
    def fewest_labels(self) -> int:
        """That make sense."""
        return 0

    @abstractmethod
    def read(self, record: Record) -> Example[T]:
        """The example in ``record``.  Raises ValueError, naming file and line, for what is none."""

    @abstractmethod
    def encoder(self, tokenizer: Tokenizer) -> Callable[[T], EncodedExample]:
        """What encodes an example; called from several threads.  An example without inputs is left out."""

    @abstractmethod
    def settings(self, tokenizer: Tokenizer) -> list[Any]:
        """All that decides how an example is read and encoded, as JSON-ready values."""

    def remarks(self, tokenizer: Tokenizer) -> list[str]:
        """What there is to say of the settings with this tokenizer."""
        return []

    def undersamples(self) -> bool:
        """Whether frequent labels are cut down to the number of the rarest."""
        return False

    def name_labels(self, found: Sequence[str]) -> list[str]:
        """The classes in their order, from those ``found`` in the training examples."""
        return list(found)

    def label_of(self, names: Sequence[str], numbers: dict[str, int]) -> int:
        """The target for the classes ``names`` of an example, and their ``numbers``."""
        return numbers[names[0]] if names else 0

    # --- building ---------------------------------------------------------------------------------------------------

    def build(self, tokenizer: Tokenizer) -> Corpus:
        return self._open(tokenizer, verify=False)

    def verify(self, tokenizer: Tokenizer) -> Corpus:
        return self._open(tokenizer, verify=True)

    def _open(self, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
        train, validation = self._find_files()
        cache_dir = Path(self.cache_dir).expanduser()
        before = [stamp(file) for file in train + validation]
        hashes = remember(cache_dir / "sha256.json", train + validation, sha256, verify=verify)
        suffixes = [file.suffixes[-2:] for file in train + validation]
        key = [
            FORMAT, self.cache_name, hashes, suffixes, len(train), self.validation_fraction, self.sequence_length,
            self.settings(tokenizer), tokenizer.fingerprint,
        ]  # fmt: skip
        preparation = ExampleWriter(self, train, validation, before, tokenizer)
        entry = find_or_make(
            cache_dir, key, lambda folder, again: ExampleCacheEntry.open(folder, tokenizer, verify=again),
            preparation.fill,            f"{self.noun}s of {self.path}", verify=verify,
        )  # fmt: skip
        return self._corpus(entry, self.remarks(tokenizer))

    def _find_files(self) -> tuple[list[Path], list[Path]]:
        train = find_records(self.path, "data.path")
        if self.validation_path is None:
            return train, []
        validation = find_records(self.validation_path, "data.validation_path")
        aside = {file.resolve() for file in validation}
        train = [file for file in train if file.resolve() not in aside]
        if not train:
            raise ValueError(f"data.path={self.path}: all of its files are for validation; name some for training")
        return train, validation

    def _corpus(self, entry: ExampleCacheEntry, remarks: list[str]) -> Corpus:
        train = Examples(entry.train, self.sequence_length, is_packed=self.packs)
        validation = None
        if len(entry.validation):
            validation = Examples(entry.validation, self.sequence_length, is_packed=self.packs)
        number = f"{len(entry.train):,} {self.noun}{'s' * (len(entry.train) != 1)} for training"
        held_out = f", {len(entry.validation):,} for validation" if validation else ""
        rows = f" in {len(train):,} rows" if self.packs else ""
        lengths = f"{train.tokens:,} tokens{rows}, the longest {entry.train.lengths.max()}"
        description = f"{self.path}, {number}{held_out}, {lengths}, about {percent(train.padding())} padding"
        labels = entry.index.labels
        counts = self.count(entry.train.labels, len(labels)) if labels else ()
        return Corpus(
            train, validation, description, entry.folder.name + ("-packed" if self.packs else ""),
            labels=tuple(labels), label_counts=counts, class_weights=self.class_weights(counts),
            notes=(*entry.index.notes, *remarks),
        )  # fmt: skip

    def count(self, targets: np.ndarray, classes: int) -> tuple[int, ...]:
        """Examples of each class."""
        return tuple(np.bincount(targets, minlength=classes).tolist())

    def class_weights(self, counts: Sequence[int]) -> tuple[float, ...]:
        """What an example of each class counts in the loss; (): all the same."""
        return ()


class ExampleWriter(Generic[T]):
    """Examples into the cache.

    Args:
        data: the option.
        train, validation: its files.
        before: what they were like when their content was hashed.
    """

    def __init__(
        self, data: ExampleData[T], train: list[Path], validation: list[Path], before: list[Stamp],
        tokenizer: Tokenizer,
    ) -> None:  # fmt: skip
        self.data = data
        self.files = [(file, TRAIN) for file in train] + [(file, VALIDATION) for file in validation]
        self.before = before
        self.tokenizer = tokenizer
        self.reader = RecordReader()

    def fill(self, folder: Path) -> None:
        """Write the files of an entry."""
        plan = self.plan()
        dtype = dtype_of(self.tokenizer.vocab_size + 1)  # and one for the place of what is no target
        streams = [ShardWriter(folder, name) for name in ("train", "validation")]
        numbers = [ShardWriter(folder, f"{name}-examples") for name in ("train", "validation")]
        cut, dropped, seen = [0, 0], [0, 0], [0, 0]
        has_targets = False
        for purpose, label, encoded in self._encode(plan):
            seen[purpose] += 1
            if not len(encoded.inputs):
                dropped[purpose] += 1
                continue
            cut[purpose] += encoded.is_cut
            streams[purpose].write(encoded.inputs.astype(dtype), 1)
            if encoded.targets is not None:
                has_targets = True
                targets = np.where(encoded.targets < 0, no_target(dtype), encoded.targets)
                streams[purpose].write(targets.astype(dtype), 0)
            numbers[purpose].write(np.array([len(encoded.inputs), label], "<i8"), 1)
        if seen[TRAIN] == dropped[TRAIN]:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length}: of all {seen[TRAIN]:,} {self.data.noun}s for "
                f"training {self.data.dropped_words}; raise it"
            )
        notes = plan.notes + self._losses(cut, dropped, seen)
        train, validation, train_examples, validation_examples = (writer.close() for writer in streams + numbers)
        ExampleIndex(
            FORMAT, dtype.str, self.tokenizer.fingerprint, train, validation, train_examples, validation_examples,
            has_targets, plan.names, notes, digest_of(has_targets, plan.names, notes),
        ).write(folder)  # fmt: skip

    def _losses(self, cut: list[int], dropped: list[int], seen: list[int]) -> list[str]:
        notes = []
        data, limit = self.data, f"longer than data.sequence_length={self.data.sequence_length}"
        for name, purpose in (("training", TRAIN), ("validation", VALIDATION)):
            for number, words in (
                (cut[purpose], data.cut_words),
                (dropped[purpose], f"{data.dropped_words}, so they are left out"),
            ):
                if number:
                    share = percent(number / seen[purpose])
                    notes.append(f"{number:,} of {seen[purpose]:,} {name} {data.noun}s ({share}) are {limit}: {words}")
        return notes

    # --- the first reading ------------------------------------------------------------------------------------------

    def plan(self) -> ExamplePlan:
        """Check every record and decide what it is for.  Raises ValueError, naming file and line, for a bad one."""
        hashes, labels, purposes = array("q"), array("q"), array("b")
        numbers: dict[tuple[str, ...], int] = {}  # of what the examples are labelled with
        first: dict[tuple[int, str], str] = {}  # where a label stands for the first time, by purpose
        for purpose, record in self._records():
            item = self.data.read(record)
            hashes.append(content_hash(item.content))
            labels.append(numbers.setdefault(item.labels, len(numbers)))
            purposes.append(purpose)
            for label in item.labels:
                first.setdefault((purpose, label), record.origin)
        plan = ExamplePlan(
            np.frombuffer(purposes, np.int8).copy() if purposes else np.empty(0, np.int8), column(labels), []
        )
        if not (plan.purposes == TRAIN).any():
            raise ValueError(f"data.path={self.data.path}: there is no {self.data.noun} in it")
        self._split(plan, column(hashes))
        self._name_labels(plan, list(numbers), first)
        self._tell_duplicates(plan, column(hashes))
        return plan

    def _split(self, plan: ExamplePlan, hashes: np.ndarray) -> None:
        data = self.data
        fraction = data.validation_fraction
        if data.validation_path is None and fraction > 0:
            plan.purposes[set_aside(hashes, plan.labels, fraction)] = VALIDATION
            if not (plan.purposes == VALIDATION).any():
                raise ValueError(
                    f"data.validation_fraction={fraction}: {len(hashes):,} {data.noun}s make none for validation; take "
                    "a larger fraction, or 0 for no validation"
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

    def _name_labels(
        self, plan: ExamplePlan, combinations: list[tuple[str, ...]], first: dict[tuple[int, str], str]
    ) -> None:
        """Turn the numbers of combinations of labels into targets."""
        if not self.data.has_labels:
            return
        used = np.bincount(plan.labels[plan.purposes == TRAIN], minlength=len(combinations)) > 0
        trained = {label for labels, is_used in zip(combinations, used, strict=True) if is_used for label in labels}
        read = list(dict.fromkeys(label for _, label in first))
        plan.names = self.data.name_labels(
            sorted(read if self.data.validation_path is None else trained, key=_sort_key)
        )
        numbers = {name: number for number, name in enumerate(plan.names)}
        for (purpose, label), origin in first.items():
            if purpose == VALIDATION and label not in trained:
                raise ValueError(
                    f"{origin}: the label {label!r} is in the validation data alone, so that nothing is learnt of "
                    f"it; in the training data there are {_few(sorted(trained, key=_sort_key))}; correct it, or "
                    "have such texts in the training data too"
                )
            if label not in numbers:
                raise ValueError(
                    f"{origin}: the label {label!r} is none of data.labels{did_you_mean(label, numbers)}; these are "
                    f"{_few(plan.names)}"
                )
        if len(trained) < self.data.fewest_labels:
            raise ValueError(
                f"data.path={self.data.path}: all training {self.data.noun}s have the label {_few(sorted(trained))}: "
                "there is nothing to tell apart; is data.label_column the right one?"
            )
        if unseen := [name for name in plan.names if name not in trained]:
            plan.notes.append(f"no training {self.data.noun} has the label {_few(unseen)}")
        targets = np.array([self.data.label_of(labels, numbers) for labels in combinations], np.int64)
        plan.labels = targets[plan.labels]

    def _tell_duplicates(self, plan: ExamplePlan, hashes: np.ndarray) -> None:
        data = self.data
        train, validation = hashes[plan.purposes == TRAIN], hashes[plan.purposes == VALIDATION]
        unique = np.unique(train)
        if repeated := len(train) - len(unique):
            plan.notes.append(f"{repeated:,} of {len(train):,} training {data.noun}s are repetitions of others")
        if both := int(np.isin(validation, unique).sum()):
            plan.notes.append(
                f"{both:,} of {len(validation):,} validation {data.noun}s ({percent(both / len(validation))}) are "
                "training data too: their loss shows what has been learnt by heart"
            )
        if data.has_labels:
            pairs = np.unique(np.stack([hashes, plan.labels]), axis=1)
            if differing := pairs.shape[1] - len(np.unique(hashes)):
                plan.notes.append(f"{differing:,} {data.noun}s are there with different labels")
        if self.reader.blank:
            plan.notes.append(f"{self.reader.blank:,} empty lines were passed over")

    def _records(self) -> Iterator[tuple[int, Record]]:
        """All records with what they are for.  Raises ValueError for a file that changes meanwhile."""
        self.reader.blank = 0
        for (file, purpose), was in zip(self.files, self.before, strict=True):
            for record in self.reader.read(file):
                yield purpose, record
            if stamp(file) != was:
                raise ValueError(f"{file}: changed while it was read; start again when it is complete")

    # --- the second -------------------------------------------------------------------------------------------------

    def _encode(self, plan: ExamplePlan) -> Iterator[tuple[int, int, EncodedExample]]:
        """Purpose, label and ids of the examples that are not left out, in order."""
        encode = self.data.encoder(self.tokenizer)

        def work(job: list[tuple[int, int, Record]]) -> list[tuple[int, int, EncodedExample]]:
            done = []
            for purpose, label, record in job:
                try:
                    done.append((purpose, label, encode(self.data.read(record).what)))
                except ValueError as error:
                    where = "" if str(error).startswith(record.origin) else f"{record.origin}: "
                    raise ValueError(f"{where}{error}") from error
                except BaseException as error:  # what a tokenizer of native code raises may be no Exception
                    what = f"{type(error).__name__}: {error}".rstrip(": ")
                    raise DataError(f"{record.origin} cannot be encoded: {what}") from error
            return done

        plans = zip(plan.purposes.tolist(), plan.labels.tolist(), self._records(), strict=True)
        wanted = ((purpose, label, record) for purpose, label, (_, record) in plans if purpose != LEFT_OUT)
        number, reported = 0, time.monotonic()
        for done in map_in_order(work, iter(lambda: list(islice(wanted, JOB)), [])):
            yield from done
            number += len(done)
            if time.monotonic() - reported > REPORT_SECONDS:
                log.info("tokenising %s: %s of %s", self.data.path, f"{number:,}", f"{len(plan.purposes):,}")
                reported = time.monotonic()


def _sort_key(label: str) -> tuple[int, int, str]:
    """Numbers by their value, and before words."""
    digits = label.removeprefix("-")
    return (0, int(label), label) if digits.isascii() and digits.isdigit() else (1, 0, label)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return f"{shown}, …" if len(names) > 20 else shown
