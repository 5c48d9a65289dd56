"""The Python language reference, which CPython ships for ``help()``: about 0.46 MB of English on every machine."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from llmtrain.data import Corpus
from llmtrain.data.cache.document_encoder import is_validation
from llmtrain.data.cache.token_cache import DocumentSource, prepare
from llmtrain.data.cached_data import CachedData
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.data.sources.overlap import KnownText
from llmtrain.data.text_data import TextData, make_corpus
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class PythonDocs(TextData):
    """One document for each topic of :mod:`pydoc_data.topics`, in alphabetical order.

    Topics quote one another.  With ``remove_repeats`` a paragraph of a topic that validates is left out if it stands in
    a topic for training; without, 14% of the validation text are training text, as in versions before this key.
    """

    remove_repeats: bool

    def open(self, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
        if not self.remove_repeats or not self.validation_fraction:
            return super().open(tokenizer, verify=verify)
        train, validation = split_topics(self.validation_fraction, "python_docs")
        return open_split(
            self,
            topics_source("python_docs", train),
            topics_source("python_docs for validation", validation),
            tokenizer,
            verify=verify,
        )

    def source(self, *, verify: bool = False) -> DocumentSource:  # nothing about the topics is remembered
        return topics_source("python_docs", read_topics("python_docs"))


@cache
def split_topics(validation_fraction: float, option: str) -> tuple[dict[str, str], dict[str, str]]:
    """The topics for training, and those for validation less their paragraphs that stand in the former.

    Topics for validation are evenly spread, at least one; one of which no paragraph is left is in neither.  ``option``:
    the name of the data in messages.
    """
    topics = read_topics(option)
    names = list(topics)
    held_out = [name for number, name in enumerate(names) if is_validation(number, validation_fraction)] or names[-1:]
    train = {name: text for name, text in topics.items() if name not in held_out}
    known = KnownText(paragraph for text in train.values() for paragraph in text.split("\n\n"))
    validation = {name: _without_known(topics[name], known) for name in held_out}
    return train, {name: text for name, text in validation.items() if text.strip()}


def _without_known(text: str, known: KnownText) -> str:
    return "\n\n".join(paragraph for paragraph in text.strip().split("\n\n") if not known.overlaps(paragraph)) + "\n"


def topics_source(name: str, topics: Mapping[str, str]) -> DocumentSource:
    """A document for each of ``topics``."""
    digest = hashlib.sha256("\0".join(topics.values()).encode()).hexdigest()

    def pieces() -> Iterator[DocumentPiece]:
        return (DocumentPiece(text, True, f"topic {topic}") for topic, text in topics.items())

    return DocumentSource(name, digest, pieces)


def open_split(
    data: CachedData, train: DocumentSource, validation: DocumentSource, tokenizer: Tokenizer, *, verify: bool
) -> Corpus:
    """Prepare and open documents for training and others for validation."""
    entries = [prepare(source, tokenizer, 0.0, data.cache, verify=verify) for source in (train, validation)]
    documents = sum(entry.index.train.documents for entry in entries)
    fingerprint = hashlib.sha256(json.dumps([entry.folder.name for entry in entries]).encode()).hexdigest()[:32]
    return make_corpus(
        entries[0].train,
        entries[1].train,
        validation_fraction=data.validation_fraction,
        sequence_length=data.sequence_length,
        name=f"{train.name}, {documents:,} documents",
        fingerprint=fingerprint,
    )


def read_topics(option: str) -> dict[str, str]:
    """The topics by name, in alphabetical order.  Raises ValueError if this Python was installed without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            f"data={option}: this Python has no pydoc_data, the language reference for help(), which some "
            "distributions leave out; install it, or take your own text: data=text data.path=…"
        ) from error
    return {name: _as_prose(text) for name, text in sorted(topics.items())}


def _as_prose(text: str) -> str:
    """``text`` with a line per paragraph, without tables and rules: a quarter of its tokens would be white space."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.splitlines()]
        kept = [line for line in lines if re.search(r"\w", line) and not line.startswith(("|", "+-"))]
        if kept:
            paragraphs.append(" ".join(" ".join(kept).split()))
    return "\n\n".join(paragraphs) + "\n"
