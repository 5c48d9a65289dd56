"""Text files of the user."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.cache.token_cache import DocumentSource
from llmtrain.data.sources.documents import DocumentPiece, read_text, split_documents
from llmtrain.data.sources.files import find_files, stamp
from llmtrain.data.text_data import TextData

SUFFIXES = (".txt", ".md", ".text")
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Text(TextData):
    """Files that are one document each, or several with ``separator`` between them."""

    path: str
    separator: str

    def source(self, *, verify: bool = False) -> DocumentSource:
        files = find_files(self.path, _is_text, f"text ({', '.join(SUFFIXES)}, also {' and '.join(COMPRESSIONS)})")
        before = [stamp(file) for file in files]
        hashes = self.hashes(files, verify=verify)
        suffixes = [file.suffix if file.suffix in COMPRESSIONS else "" for file in files]

        def pieces() -> Iterator[DocumentPiece]:
            for file, was in zip(files, before, strict=True):
                yield from split_documents(read_text(file), self.separator, str(file))
                if stamp(file) != was:
                    raise ValueError(f"{file}: changed while it was read; start again when it is complete")

        return DocumentSource(f"text {self.path}", json.dumps([self.separator, hashes, suffixes]), pieces)


def _is_text(file: Path) -> bool:
    name = Path(file.stem) if file.suffix in COMPRESSIONS else file
    return name.suffix in SUFFIXES
