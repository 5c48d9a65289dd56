"""Base of the options whose data are files, prepared or checked once with the help of a cache."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data import Corpus, DataConfig
from llmtrain.data.sources.files import remember, sha256
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class CachedData(DataConfig):
    """Data with a share set aside for validation, and a cache of what is slow to compute."""

    sequence_length: int
    validation_fraction: float
    shuffle: bool
    cache_dir: str

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length={self.sequence_length}: must be positive")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}: must be at least 0 (no validation) and below 1"
            )

    @abstractmethod
    def open(self, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
        """Do the work of :meth:`build`, or with ``verify`` that of :meth:`verify`."""

    def build(self, tokenizer: Tokenizer) -> Corpus:
        return self.open(tokenizer, verify=False)

    def verify(self, tokenizer: Tokenizer) -> Corpus:
        return self.open(tokenizer, verify=True)

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir).expanduser()

    def hashes(self, files: Sequence[Path], *, verify: bool) -> list[str]:
        """The sha256 of each file: remembered unless it has changed, or computed again with ``verify``."""
        return remember(self.cache / "sha256.json", files, sha256, verify=verify)


def training_files(path: str, files: Sequence[Path], validation: Sequence[Path]) -> list[Path]:
    """Those of ``files``, found at ``path``, that are not for validation.  Raises ValueError if none is left."""
    held_out = {file.resolve() for file in validation}
    train = [file for file in files if file.resolve() not in held_out]
    if not train:
        raise ValueError(f"data.path={path}: all of its files are for validation; name some for training")
    return train
