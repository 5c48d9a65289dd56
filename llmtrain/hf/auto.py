"""``model=auto``: the architecture that a checkpoint's ``config.json`` says."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.directory import locate_directory
from llmtrain.hf.families import family_of_checkpoint
from llmtrain.model import ModelConfig
from llmtrain.model.layers.rotary import Scaling

SEQUENCE = 1024  # tokens; what a sequence has at most where nobody says how long it is to be


@dataclass(frozen=True)
class Auto:
    """Stands for the config of the model that it finds: a run has that one, and needs the checkpoint no longer."""

    path: str
    context_length: int | None
    dropout: float
    tie_embeddings: bool | None

    def resolved(self) -> ModelConfig:
        """The model's own config.  Raises ValueError, naming file and key, for what is not known here."""
        config = ConfigJson.read(locate_directory(self.path))
        config.check_architecture()
        model: Any = family_of_checkpoint(config).read_config(config)
        return self.adapted(model, str(config.file))

    def adapted(self, model: Any, where: str = "") -> ModelConfig:
        """``model``, which was found in ``where``, with what is set here.  Raises ValueError for a context too long."""
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
        """``data.sequence_length`` where nobody has set it: a context of 128 thousand tokens trains on few devices."""
        return min(context_length, SEQUENCE)
