"""Token files that are already prepared: by this program, by nanoGPT, by llm.c or modded-nanogpt."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtrain.data import Corpus, DataConfig
from llmtrain.data.corpus import check_options, make_corpus
from llmtrain.data.files import find_files, remember
from llmtrain.data.index import INDEX
from llmtrain.data.token_file import Format, TokenFile, check_ids, find_largest, read_indices, recognise
from llmtrain.tokenizer import Tokenizer

# train.bin and val.bin (nanoGPT), fineweb_val_000000.bin (llm.c), validation-00000.bin (ours)
VALIDATION = re.compile(r"(?<![a-z])val(id(ation)?)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Shards(DataConfig):
    """The token files that ``path`` names, one stream in the order of their names.

    Validation is ``validation_path``; else, of a folder or a glob, the files with ``val`` or ``validation`` as a word
    of their name; else the last ``validation_fraction`` of the tokens.  A file is never in both parts.
    """

    path: str
    validation_path: str | None
    format: Format
    sequence_length: int
    validation_fraction: float
    shuffle: bool
    cache_dir: str

    def __post_init__(self) -> None:
        check_options(self.sequence_length, self.validation_fraction)

    def build(self, tokenizer: Tokenizer) -> Corpus:
        train, validation = self._find_parts()
        return make_corpus(
            self._open(train, tokenizer),
            self._open(validation, tokenizer),
            validation_fraction=self.validation_fraction,
            sequence_length=self.sequence_length,
            name=f"shards {self.path}, {len(train)} file{'s' * (len(train) != 1)}",
            fingerprint=sampled_digest([*train, *validation]),
        )

    def _find_parts(self) -> tuple[list[Path], list[Path]]:
        files = _find(self.path)
        if self.validation_path is not None:
            validation = _find(self.validation_path)
            set_aside = {file.resolve() for file in validation}
            train = [file for file in files if file.resolve() not in set_aside]
        elif files == [Path(self.path).expanduser()]:
            train, validation = files, []
        else:
            train = [file for file in files if not VALIDATION.search(file.stem)]
            validation = [file for file in files if VALIDATION.search(file.stem)]
            if not self.validation_fraction:
                validation = []
        if not train:
            raise ValueError(f"data.path={self.path}: all of its files are for validation; name some for training")
        return train, validation

    def _open(self, paths: list[Path], tokenizer: Tokenizer) -> list[np.ndarray]:
        indices = read_indices({path.parent for path in paths}, self.format)
        files = [recognise(path, self.format, indices.get(path.parent)) for path in paths]
        for file in files:
            self._check(file, tokenizer)
        return [file.open() for file in files]

    def _check(self, file: TokenFile, tokenizer: Tokenizer) -> None:
        if file.tokenizer not in (None, tokenizer.fingerprint):
            raise ValueError(f"{file.path}: made by another tokenizer, as {INDEX} says; set tokenizer=… to that one")
        memo = Path(self.cache_dir).expanduser() / f"largest-id-{file.dtype[1:]}-{file.offset}.json"
        (largest,) = remember(memo, [file.path], lambda _: find_largest(file))
        check_ids(file, largest, tokenizer.vocab_size)


def sampled_digest(files: list[Path]) -> str:
    """Stands for the files' sizes and 64 blocks of each: another file is told from them without reading them whole."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        with path.open("rb") as file:
            for block in range(64):
                file.seek(size * block // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:32]


def _find(path: str) -> list[Path]:
    return find_files(path, lambda file: file.suffix == ".bin", "token file (.bin)")
