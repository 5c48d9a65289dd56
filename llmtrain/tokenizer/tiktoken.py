"""An encoding of the tiktoken package, or merge ranks from a file."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import tiktoken

from llmtrain.tokenizer import TokenizerConfig
from llmtrain.tokenizer.bpe import BPE, END_OF_TEXT, PATTERNS, read_ranks, write_ranks
from llmtrain.tokenizer.directory import parse_object, read_bytes, read_file
from llmtrain.tokenizer.gpt2 import GPT2

SAMPLE = "It's 12,345 o'clock — été,\tÑandú,\r\n\n  你好。 🙂\u00a0_x_ \x07 "  # characters of every class


RANKS, FACTS = "ranks.tiktoken", "encoding.json"  # the copy of an encoding
IN_THE_PACKAGE = ("gpt2", "r50k_base")


@dataclass(frozen=True)
class StoredEncoding(TokenizerConfig):
    """A copy of one of the package's encodings, for a machine that has not downloaded it."""

    folder: str
    end_of_text: str

    def build(self) -> BPE:
        folder = Path(self.folder)
        facts = parse_object(read_file(folder / FACTS), folder / FACTS)
        pattern, special_tokens = facts.get("pattern"), facts.get("special_tokens")
        if not isinstance(pattern, str) or not isinstance(special_tokens, dict):
            raise ValueError(f"{folder / FACTS}: needs a pattern and special_tokens")
        encoding = tiktoken.Encoding(
            folder.name, pat_str=pattern, mergeable_ranks=read_ranks(folder / RANKS), special_tokens=special_tokens
        )
        return BPE(encoding, self.end_of_text)


@dataclass(frozen=True)
class Tiktoken(TokenizerConfig):
    """An encoding by name, such as ``cl100k_base``, or the path of a ``.tiktoken`` file."""

    encoding: str
    pattern: str | None
    end_of_text: str

    def __post_init__(self) -> None:
        if self.is_file and not self.pattern:
            raise ValueError(
                f"pattern={self.pattern!r}: {self.encoding} holds merge ranks only; the pattern that splits a text "
                f"must be given: one of {', '.join(PATTERNS)}, or a regular expression"
            )
        if not self.is_file and self.pattern is not None:
            raise ValueError(
                f"pattern={self.pattern!r}: encoding={self.encoding} brings its own; take pattern=null, "
                "or name a .tiktoken file as the encoding"
            )
        if not self.end_of_text:
            raise ValueError(f"end_of_text={self.end_of_text!r}: must not be empty; such as {END_OF_TEXT!r}")

    @property
    def is_file(self) -> bool:
        return self.encoding.endswith(".tiktoken") or "/" in self.encoding

    def files(self) -> dict[str, bytes]:
        if self.is_file:
            return {RANKS: read_bytes(Path(self.encoding).expanduser())}
        if self.encoding in IN_THE_PACKAGE:
            return {}
        encoding = self._load()
        facts = {"pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
        return {RANKS: write_ranks(encoding._mergeable_ranks), FACTS: json.dumps(facts).encode()}

    def at(self, folder: Path) -> TokenizerConfig:
        if self.is_file:
            return replace(self, encoding=str(folder / RANKS))
        return self if self.encoding in IN_THE_PACKAGE else StoredEncoding(str(folder), self.end_of_text)

    def build(self) -> BPE:
        return self._read() if self.is_file else self._get()

    def _get(self) -> BPE:
        encoding = self._load()
        if self.end_of_text not in encoding.special_tokens_set:
            raise ValueError(
                f"tokenizer.end_of_text={self.end_of_text}: not a special token of {self.encoding}; "
                f"there are {', '.join(sorted(encoding.special_tokens_set))}"
            )
        return BPE(encoding, self.end_of_text)

    def _load(self) -> tiktoken.Encoding:
        if self.encoding in IN_THE_PACKAGE:
            return GPT2().build().encoding  # the same ids, without a download
        names = tiktoken.list_encoding_names()
        if self.encoding not in names:
            raise ValueError(
                f"tokenizer.encoding={self.encoding}: no such encoding; there are {', '.join(names)}, "
                "or give the path of a .tiktoken file"
            )
        try:
            return tiktoken.get_encoding(self.encoding)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise ValueError(
                f"tokenizer.encoding={self.encoding}: tiktoken could not download it ({type(error).__name__}); where "
                "there is no network, give the path of a .tiktoken file and tokenizer.pattern, or tokenizer=gpt2"
            ) from error

    def _read(self) -> BPE:
        path = Path(self.encoding).expanduser()
        try:
            ranks = read_ranks(path)
        except ValueError as error:
            raise ValueError(f"tokenizer.encoding={error}") from error
        if self.end_of_text.encode() in ranks:
            raise ValueError(f"tokenizer.end_of_text={self.end_of_text}: an ordinary token of {path}; take another")
        assert self.pattern is not None
        pattern = PATTERNS.get(self.pattern, self.pattern)
        try:
            special_tokens = {self.end_of_text: max(ranks.values()) + 1}
            encoding = tiktoken.Encoding(
                path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
            )
        except ValueError as error:
            raise ValueError(f"tokenizer.pattern={self.pattern}: not a regular expression: {error}") from error
        tokenizer = BPE(encoding, self.end_of_text)
        if tokenizer.decode(tokenizer.encode(SAMPLE).tolist()) != SAMPLE:
            raise ValueError(
                f"tokenizer.pattern={self.pattern}: loses text that it does not match; take one of "
                f"{', '.join(PATTERNS)}, or a regular expression that matches every character"
            )
        return tokenizer
