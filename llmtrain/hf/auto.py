"""``model=auto``: the architecture that a checkpoint's ``config.json`` describes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.directory import locate_directory
from llmtrain.hf.families import family_of_checkpoint
from llmtrain.model import ModelConfig
from llmtrain.model.layers.rotary import Scaling

DEFAULT_SEQUENCE_LENGTH = 1024  # tokens; at most, where data.sequence_length is not set


TOKENIZER_FILES = {  # that a checkpoint may hold, by the option that reads each
    "tokenizer.json": "huggingface",
    "tokenizer.model": "sentencepiece",
}


@dataclass(frozen=True)
class AutoTokenizer:
    """Placeholder for the tokenizer of the weights; a run stores the option that was found."""


def find_tokenizer_option(path: str) -> str | None:
    """The option that reads the tokenizer in the checkpoint directory ``path``; None if there is none."""
    try:
        folder = locate_directory(path)
    except ValueError:
        return None  # the weights will be missed, and named, by who needs them
    return next((option for file, option in TOKENIZER_FILES.items() if (folder / file).is_file()), None)


@dataclass(frozen=True)
class AutoModel:
    """Placeholder for the config of the model in ``path``; a run stores that config and no longer needs ``path``."""

    path: str
    context_length: int | None
    dropout: float
    tie_embeddings: bool | None

    def resolved(self) -> ModelConfig:
        """The model's own config.  Raises ValueError, naming file and key, for what is not supported."""
        config = ConfigJson.read(locate_directory(self.path))
        config.check_architecture()
        model: Any = family_of_checkpoint(config).read_config(config)
        return self.adapted(model, str(config.file))

    def adapted(self, model: Any, where: str = "") -> ModelConfig:
        """``model``, found in ``where``, with the settings made here.  Raises ValueError for a context too long."""
        positions = model.context_length
        longest = (
            positions * model.rope_factor if getattr(model, "rope_scaling", None) is Scaling.dynamic else positions
        )
        if self.context_length is not None and self.context_length > longest:
            raise ValueError(
                f"context_length={self.context_length}: the model would be longer than its positions, {positions} in "
                f"{where or self.path}; take at most that"
            )
        return dataclasses.replace(
            model,
            context_length=self.context_length or positions,
            dropout=self.dropout,
            tie_embeddings=model.tie_embeddings if self.tie_embeddings is None else self.tie_embeddings,
        )

    @staticmethod
    def sequence_length(context_length: int) -> int:
        """The default of ``data.sequence_length``: a context of 128 thousand tokens would fit on few devices."""
        return min(context_length, DEFAULT_SEQUENCE_LENGTH)
