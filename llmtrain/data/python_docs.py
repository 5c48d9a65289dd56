"""The Python language reference, which CPython ships for ``help()``: about 0.46 MB of English on every machine."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.data.cache.token_cache import DocumentSource
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.data.text_data import TextData


@dataclass(frozen=True)
class PythonDocs(TextData):
    """One document for each topic of :mod:`pydoc_data.topics`, in alphabetical order."""

    def source(self, *, verify: bool = False) -> DocumentSource:  # nothing about the topics is remembered
        topics = _read_topics()
        digest = hashlib.sha256("\0".join(topics.values()).encode()).hexdigest()

        def pieces() -> Iterator[DocumentPiece]:
            return (DocumentPiece(text, True, f"topic {name}") for name, text in topics.items())

        return DocumentSource("python_docs", digest, pieces)


def _read_topics() -> dict[str, str]:
    from pydoc_data.topics import topics

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
