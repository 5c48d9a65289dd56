"""Token files prepared in advance by this program, nanoGPT, llm.c or modded-nanogpt."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.base.format import percent
from llmtrain.base.options import RunFacts
from llmtrain.data import Corpus
from llmtrain.data.cache.id_width import TokenType
from llmtrain.data.cache.integrity import DamagedFile, open_checked
from llmtrain.data.cache.shard_index import INDEX
from llmtrain.data.cache.token_file import TokenFile, TokenFileFormat, read_indices, recognise
from llmtrain.data.cache.token_reader import TokenSlice
from llmtrain.data.cached_data import CachedData, training_files
from llmtrain.data.sources.search import LeftOut, find_files, nothing_found
from llmtrain.data.text_data import make_corpus
from llmtrain.tokenizer import Tokenizer

# train.bin and val.bin (nanoGPT), fineweb_val_000000.bin (llm.c), validation-00000.bin (ours)
BESIDE = (".idx", ".json")  # of files that describe token files
VALIDATION = re.compile(r"(?<![a-z])val(id(ation)?)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Shards(CachedData):
    """The token files in ``path``: one stream in the order of their names.

    Validation uses ``validation_path``; without it, the files of a folder or glob with ``val`` or ``validation`` as a
    word of their name; else the last ``validation_fraction`` of the tokens.  A file never serves both.
    """

    path: str
    validation_path: str | None
    format: TokenFileFormat
    dtype: TokenType

    def open(self, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
        left_out = [LeftOut(), LeftOut()]
        train, validation = self._find_parts(left_out)
        files = self._recognise([*train, *validation], tokenizer)
        try:
            tokens = open_checked(files, tokenizer.vocab_size, self.cache, verify=verify)
        except DamagedFile as error:
            raise ValueError(f"{error}; restore it from a copy or prepare the shards again") from error
        corpus = make_corpus(
            tokens[: len(train)],
            tokens[len(train) :],
            validation_fraction=self.validation_fraction,
            sequence_length=self.sequence_length,
            name=f"shards {self.path}, {len(train)} file{'s' * (len(train) != 1)}",
            fingerprint=fingerprint_of(tokens, len(train)),
        )
        return replace(corpus, left_out=tuple(left_out), split=_describe(validation, corpus))

    def unread(self, run: RunFacts) -> dict[str, str]:
        if self.validation_path is not None:
            return {
                "validation_fraction": f"data.validation_path={self.validation_path} is the validation data; leave out "
                "one of the two"
            }
        if run.validation_tokens is None:
            return {}
        tokens = run.train_tokens + run.validation_tokens
        if run.validation_tokens == int(tokens * self.validation_fraction):
            return {}  # this share was cut off the tokens, so the validation data are not files
        return {
            "validation_fraction": f"the files of data.path={self.path} named val or validation are the validation "
            "data, whole; to cut off a share of the others, name only these in data.path"
        }

    def _find_parts(self, left_out: Sequence[LeftOut]) -> tuple[list[Path], list[Path]]:
        files, validation = _find(self.path, "data.path", left_out[0]), []
        if self.validation_path is not None:
            validation = _find(self.validation_path, "data.validation_path", left_out[1])
        elif files != [Path(self.path).expanduser()]:
            validation = [file for file in files if VALIDATION.search(file.stem)]
        train = training_files(self.path, files, validation)
        return train, validation if self.validation_fraction or self.validation_path is not None else []

    def _recognise(self, paths: list[Path], tokenizer: Tokenizer) -> list[TokenFile]:
        indices = read_indices({path.parent for path in paths}, self.format)
        recognised = [
            recognise(path, self.format, indices.get(path.parent), self.dtype, tokenizer.vocab_size) for path in paths
        ]
        types = {file.dtype for file in recognised if file is not None}
        types_known = ", ".join(name for name in TokenType.__members__ if name != "auto")
        files = []
        for path, file in zip(paths, recognised, strict=True):
            if file is None and len(types) != 1:
                raise ValueError(
                    f"{path}: the type of its ids is not clear, with a vocabulary of {tokenizer.vocab_size:,}; "
                    f"name it with data.dtype=TYPE (one of {types_known})"
                )
            files.append(file or TokenFile(path, next(iter(types)), 0))
        for file in files:
            if file.tokenizer not in (None, tokenizer.fingerprint):
                raise ValueError(
                    f"{file.path}: made by another tokenizer according to {INDEX}; set tokenizer=… to that one"
                )
        return files


def fingerprint_of(tokens: list[TokenSlice], train: int) -> str:
    """A hash of every byte of the files, of their format, and of their use: the first ``train`` files train."""
    parts = [[each.file.sha256, each.dtype.str, len(each)] for each in tokens]
    return hashlib.sha256(json.dumps([train, parts]).encode()).hexdigest()[:32]


def _find(path: str, key: str, left_out: LeftOut) -> list[Path]:
    found = find_files(path, lambda file: file.suffix in (".bin", *BESIDE), "token file (.bin)", key, left_out)
    files = [file for file in found if file.suffix not in BESIDE or file in left_out.named]
    if not files:
        raise nothing_found(path, "token file (.bin)", key, left_out)
    return files


def _describe(validation: Sequence[Path], corpus: Corpus) -> str:
    if corpus.validation is None:
        return ""
    share = percent(corpus.validation.tokens / (corpus.validation.tokens + corpus.train.tokens))
    names = [file.name for file in validation[:3]] + ["…"] * (len(validation) > 3)
    return f"{share} of the tokens: {', '.join(names) or 'the last of them'}"
