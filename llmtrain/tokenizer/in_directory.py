"""Options of tokenizers whose file lies in a directory, beside others that belong to it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from llmtrain.tokenizer import TokenizerConfig
from llmtrain.tokenizer.as_transformers import check_version
from llmtrain.tokenizer.directory import beside, locate_file, read_bytes


@dataclass(frozen=True)
class TokenizerInDirectory(TokenizerConfig):
    """The path of a tokenizer's file, or of a directory that holds one."""

    path: str
    end_of_text: str | None
    version: int

    file_name: ClassVar[str]
    if_missing: ClassVar[str]  # what the user may have meant, where there is no such file

    def __post_init__(self) -> None:
        check_version(self.version)

    def files(self) -> dict[str, bytes]:
        file = self.locate()
        return {self.file_name: read_bytes(file), **beside(file)}

    def at(self, folder: Path) -> Self:
        return replace(self, path=str(folder))

    def locate(self) -> Path:
        """The tokenizer's file.  Raises ValueError if there is none."""
        return locate_file(self.path, self.file_name, self.if_missing)
