"""English prose that every Python carries: its language reference, and its library's docstrings, comments and help."""

import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.data import Corpus
from llmtrain.data.cache.token_cache import DocumentSource
from llmtrain.data.python_docs import open_split, read_topics, split_topics, topics_source
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.data.sources.overlap import KnownText
from llmtrain.data.sources.python_prose import library_files, missing_parts, paragraphs_of
from llmtrain.data.text_data import TextData
from llmtrain.tokenizer import Tokenizer

NAME = "python_prose"
EXTRACTION = 1  # changes whenever other text is taken from the same files


@dataclass(frozen=True)
class PythonProse(TextData):
    """A document for each topic of the language reference, and for the prose of each file of the library.

    The topics for validation are those of :class:`PythonDocs`.  A paragraph of the library that overlaps with them, or
    that stood in an earlier file, is left out.
    """

    def open(self, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
        if self.validation_fraction:
            validation = topics_source(f"{NAME} for validation", self._topics()[1])
            corpus = open_split(self, self.source(verify=verify), validation, tokenizer, verify=verify)
        else:
            corpus = super().open(tokenizer, verify=verify)
        return replace(corpus, notes=(*corpus.notes, *_notes(_library())))

    def source(self, *, verify: bool = False) -> DocumentSource:
        """The documents for training."""
        files = library_files(_library())
        topics, validation = self._topics()
        content = [EXTRACTION, topics, validation, self.hashes(files, verify=verify)]
        return DocumentSource(NAME, json.dumps(content), lambda: _documents(topics, validation, files))

    def _topics(self) -> tuple[dict[str, str], dict[str, str]]:
        """The topics for training and for validation."""
        return split_topics(self.validation_fraction, NAME) if self.validation_fraction else (read_topics(NAME), {})


def _documents(
    topics: Mapping[str, str], validation: Mapping[str, str], files: Sequence[Path]
) -> Iterator[DocumentPiece]:
    yield from topics_source(NAME, topics).pieces()
    held_out = KnownText(paragraph for text in validation.values() for paragraph in text.split("\n\n"))
    seen: set[str] = set()
    for file in files:
        new = [text for text in dict.fromkeys(paragraphs_of(file)) if text not in seen]
        seen.update(new)
        if kept := [text for text in new if not held_out.overlaps(text)]:
            yield DocumentPiece("\n\n".join(kept) + "\n", True, str(file))


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _notes(folder: Path) -> Iterator[str]:
    """Messages about parts of the library that this Python lacks, so that the text is another than elsewhere."""
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if not library_files(folder):
        yield f"{folder} has no sources of the library: the text is the language reference alone"
    elif missing := missing_parts(folder):
        yield f"{folder} lacks {', '.join(missing)} of {version}: there is less text than in a complete one"
