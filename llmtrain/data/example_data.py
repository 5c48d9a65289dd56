"""Base of the options whose data are examples: from files of records to a :class:`Corpus`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.base.format import percent
from llmtrain.data import Corpus
from llmtrain.data.cache.entries import find_or_make, name_of
from llmtrain.data.cache.example_cache import EARLIER_FORMAT, FORMAT, ExampleCacheEntry
from llmtrain.data.cache.example_plan import ExampleFiles
from llmtrain.data.cache.example_writer import write_examples
from llmtrain.data.cached_data import CachedData, training_files
from llmtrain.data.example_format import ExampleFormat, T
from llmtrain.data.examples import Examples
from llmtrain.data.sources.files import remember, stamp
from llmtrain.data.sources.records import count_stray_quotes, find_records, record_suffix
from llmtrain.data.sources.search import LeftOut
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExampleData(CachedData, ExampleFormat[T]):
    """Examples in files of records."""

    path: str
    validation_path: str | None

    def open(self, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
        left_out = [LeftOut(), LeftOut()]
        train, validation = self._find_files(left_out)
        before = [stamp(file) for file in train + validation]
        hashes = self.hashes(train + validation, verify=verify)
        suffixes = [file.suffixes[-2:] for file in train + validation]
        key = [
            self.cache_name, hashes, suffixes, len(train), self.validation_fraction, self.sequence_length,
            self.settings(tokenizer), tokenizer.fingerprint,
        ]  # fmt: skip
        if any(self._stray_quotes(train + validation, verify=verify)):
            key.append("tsv-2")  # older versions let such a quote swallow the rows after it
        files = ExampleFiles(train, validation, before)

        def fill(folder: Path) -> None:
            write_examples(folder, self, files, tokenizer)

        def open_entry(folder: Path, verify: bool) -> ExampleCacheEntry:
            return ExampleCacheEntry.open(folder, tokenizer, verify=verify)

        new = [FORMAT, *key, self.new_settings()]
        entry = find_or_make(self.cache, new, open_entry, fill, f"{self.noun}s of {self.path}", verify=verify)
        fingerprint = entry.folder.name if entry.index.is_new else name_of([EARLIER_FORMAT, *key])
        return replace(self._corpus(entry, self.remarks(tokenizer), fingerprint), left_out=tuple(left_out))

    def _find_files(self, left_out: Sequence[LeftOut]) -> tuple[list[Path], list[Path]]:
        train = find_records(self.path, "data.path", left_out[0])
        if self.validation_path is None:
            return train, []
        validation = find_records(self.validation_path, "data.validation_path", left_out[1])
        return training_files(self.path, train, validation), validation

    def _stray_quotes(self, files: Sequence[Path], *, verify: bool) -> list[int]:
        """The rows of each TSV file with a double quote that nothing closes."""
        tables = [file for file in files if record_suffix(file) == ".tsv"]
        return remember(self.cache / "tsv.json", tables, count_stray_quotes, verify=verify)

    def _corpus(self, entry: ExampleCacheEntry, remarks: list[str], fingerprint: str) -> Corpus:
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
            train, validation, description, fingerprint + ("-packed" if self.packs else ""),
            labels=tuple(labels), label_counts=counts, class_weights=self.class_weights(counts),
            notes=(*entry.index.notes, *remarks),
        )  # fmt: skip
