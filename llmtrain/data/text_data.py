"""Base of the options whose data are text: from documents or token streams to a :class:`Corpus`."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmtrain.data import Corpus
from llmtrain.data.cache.token_cache import DocumentSource, prepare
from llmtrain.data.cached_data import CachedData
from llmtrain.data.order.document_split import Split
from llmtrain.data.sequences import Shard, Stream, slice_stream
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextData(CachedData):
    """Documents of text, tokenised once into a cache."""

    @abstractmethod
    def source(self, *, verify: bool = False) -> DocumentSource:
        """Find the documents; with ``verify`` read again what is remembered of them.

        Raises ValueError if there are none, or if a verified file has changed.
        """

    @property
    def split_rule(self) -> Split:
        """The rule that sets text aside for validation."""
        return Split.documents

    def open(self, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
        source = self.source(verify=verify)
        entry = prepare(source, tokenizer, self.validation_fraction, self.cache, split=self.split_rule, verify=verify)
        documents = entry.index.train.documents + entry.index.validation.documents
        corpus = make_corpus(
            entry.train,
            entry.validation,
            validation_fraction=self.validation_fraction,
            sequence_length=self.sequence_length,
            name=f"{source.name}, {documents:,} document{'s' * (documents != 1)}",
            fingerprint=entry.folder.name,
        )
        return replace(corpus, split=entry.index.split, notes=tuple(entry.index.notes), left_out=source.left_out)


def make_corpus(
    train: Sequence[Shard],
    validation: Sequence[Shard],
    *,
    validation_fraction: float,
    sequence_length: int,
    name: str,
    fingerprint: str,
) -> Corpus:
    """Cut streams of token ids into sequences.

    Without a ``validation`` stream, the last ``validation_fraction`` of the tokens validates.  Raises ValueError for a
    stream that is too short for one sequence.
    """
    if not validation and validation_fraction > 0:
        train, validation = _split(train, validation_fraction)
    training = Stream(train, sequence_length)
    if not training:
        raise ValueError(
            f"data.sequence_length={sequence_length}: {name}: {training.tokens:,} tokens for training make no "
            f"sequence, which takes {sequence_length + 1:,}; give more text, or data.sequence_length="
            f"{max(training.tokens - 1, 1)} or less"
        )
    if not validation_fraction and not validation:
        return Corpus(training, None, f"{name}, {training.tokens:,} tokens", fingerprint)
    held_out = Stream(validation, sequence_length)
    if not held_out:
        raise ValueError(
            f"data.validation_fraction={validation_fraction}: {name}: {held_out.tokens:,} tokens for validation make "
            f"no sequence, which takes {sequence_length + 1:,}; take a larger fraction, 0 for no validation, "
            f"or data.sequence_length={max(held_out.tokens - 1, 1)} or less"
        )
    tokens = f"{training.tokens:,} tokens for training, {held_out.tokens:,} for validation"
    return Corpus(training, held_out, f"{name}, {tokens}", fingerprint)


def _split(shards: Sequence[Shard], fraction: float) -> tuple[list[Shard], list[Shard]]:
    tokens = sum(map(len, shards))
    cut = tokens - int(tokens * fraction)
    return slice_stream(shards, 0, cut), slice_stream(shards, cut, tokens)
