"""Text files of the user."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llmtrain.base.options import RunFacts
from llmtrain.data.cache.token_cache import Documents, DocumentSource
from llmtrain.data.cached_data import training_files
from llmtrain.data.order.document_split import Split
from llmtrain.data.sources.documents import COMPRESSIONS, DocumentPiece
from llmtrain.data.sources.files import stamp
from llmtrain.data.sources.records import record_suffix
from llmtrain.data.sources.search import LeftOut, find_files
from llmtrain.data.sources.text_files import ReadingAccount, TextFile, find_text_files, read_documents
from llmtrain.data.text_data import TextData

PLAIN_SUFFIXES = (".txt", ".md", ".text")
PLAIN_COMPRESSIONS = (".gz", ".zst")


class TextFiles(Enum):
    """The files of a folder that are read."""

    all = "all that can be read: text of any ending, and rows"
    plain = "those that are named .txt, .md or .text, and no linked folders; a file of rows is text as it stands"


@dataclass(frozen=True)
class Text(TextData):
    """Files of plain text, a document each or several with ``separator`` between them, and of rows, a document each.

    Validation uses ``validation_path``; without it, a share of the tokens.  A file never serves both.
    """

    path: str
    validation_path: str | None
    files: TextFiles
    text_column: str | None
    separator: str
    split: Split

    @property
    def split_rule(self) -> Split:
        return self.split

    def source(self, *, verify: bool = False) -> DocumentSource:
        left_out = [LeftOut(), LeftOut()]
        train, validation = self._find(self.path, "data.path", left_out[0], verify), []
        if self.validation_path is not None:
            validation = self._find(self.validation_path, "data.validation_path", left_out[1], verify)
            kept = set(training_files(self.path, [f.path for f in train], [f.path for f in validation]))
            train = [file for file in train if file.path in kept]
        account = ReadingAccount()
        documents = self._documents(train, account, verify=verify)
        return DocumentSource(
            f"text {self.path}",
            *documents,
            validation=self._documents(validation, account, verify=verify) if validation else None,
            left_out=tuple(left_out),
            notes=account.notes,
        )

    def unread(self, run: RunFacts) -> dict[str, str]:
        if self.validation_path is None:
            return super().unread(run)
        why = f"data.validation_path={self.validation_path} is the validation data; leave out one of the two"
        return super().unread(run) | {"validation_fraction": why, "split": why}

    def _find(self, path: str, key: str, left_out: LeftOut, verify: bool) -> list[TextFile]:
        if self.files is TextFiles.all:
            return find_text_files(path, key, self.text_column, self.cache / "text-files.json", left_out, verify=verify)
        wanted = f"text ({', '.join(PLAIN_SUFFIXES)}, also {' and '.join(PLAIN_COMPRESSIONS)})"
        found = find_files(path, _is_plain, wanted, key, left_out, follows_links=False)
        return [TextFile(file, None) for file in found]

    def _documents(self, files: list[TextFile], account: ReadingAccount, *, verify: bool) -> Documents:
        paths = [file.path for file in files]
        stamps = [stamp(path) for path in paths]
        hashes = self.hashes(paths, verify=verify)
        suffixes = [path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else "" for path in paths]
        content: list[Any] = [self.separator, hashes, suffixes]
        if any(file.column is not None for file in files):
            content.append([[file.column, record_suffix(file.path)] for file in files])

        def pieces() -> Iterator[DocumentPiece]:
            return read_documents(files, stamps, self.separator, account)

        return Documents(json.dumps(content), pieces)


def _is_plain(file: Path) -> bool:
    name = Path(file.stem) if file.suffix in PLAIN_COMPRESSIONS else file
    return name.suffix in PLAIN_SUFFIXES
