"""The sources of Python's standard library: about 12 MB of code and English on every machine."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.cache.token_cache import DocumentSource
from llmtrain.data.order.document_split import Split
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.data.text_data import TextData

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # other packages, and tests


@dataclass(frozen=True)
class PythonStdlib(TextData):
    """One document for each ``.py`` file of the running Python's library, sorted by path."""

    split: Split

    @property
    def split_rule(self) -> Split:
        return self.split

    def source(self, *, verify: bool = False) -> DocumentSource:
        folder = Path(sysconfig.get_path("stdlib"))
        files = sorted(_find_sources(folder))
        if not files:
            raise ValueError(f"data=python_stdlib: there are no sources in {folder}; take data=python_docs")
        hashes = self.hashes(files, verify=verify)

        def pieces() -> Iterator[DocumentPiece]:
            return (DocumentPiece(text, True, str(path)) for path in files if (text := _read(path)))

        return DocumentSource("python_stdlib", "python-source " + " ".join(hashes), pieces)


def _find_sources(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = set(folders) - LEFT_OUT  # os.walk only enters the folders left here
        yield from (Path(root, name) for name in names if name.endswith(".py"))


def _read(path: Path) -> str:
    """The source, decoded as Python does; empty for files that cannot be decoded on purpose, such as test data."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
