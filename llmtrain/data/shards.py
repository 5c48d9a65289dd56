"""Token files that are already prepared: by this program, by nanoGPT, by llm.c or modded-nanogpt."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtrain.data import Corpus, DataConfig
from llmtrain.data.corpus import check_options, make_corpus
from llmtrain.data.files import find_files, remember
from llmtrain.data.index import INDEX, Index
from llmtrain.data.token_file import Format, check_ids, find_largest, recognise
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shards(DataConfig):
    """The token files that ``path`` names, one stream in the order of their names.

    Validation is, in this order: ``validation_path``; of a folder, its files for validation (those of this program's
    index, else those with ``val`` or ``validation`` as a word of their name, as nanoGPT and llm.c call them); the last
    ``validation_fraction`` of the tokens.
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
        )
