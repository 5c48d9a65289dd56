"""The weights of another run."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmtrain.checkpoint.directory import locate_checkpoint
from llmtrain.checkpoint.format import read_state, verify_checkpoint, weights_digest
from llmtrain.checkpoint.model_state import read_fitting, read_own_parts
from llmtrain.checkpoint.own_parts import OwnParts
from llmtrain.model import LanguageModel
from llmtrain.weights import Weights


@dataclass(frozen=True)
class Checkpoint(Weights):
    """The model of a run or checkpoint directory; without its optimizer state, step and data position."""

    path: str

    takes_parts: ClassVar[bool] = True

    def load(self, model: LanguageModel) -> None:
        model.load_state_dict(read_fitting(self._find(), model.state_dict()))

    def load_parts(self, model: LanguageModel, parts: OwnParts) -> None:
        read_own_parts(self._find(), parts)

    def _find(self) -> Path:
        """The checkpoint, known to be intact and to hold a whole model."""
        checkpoint = locate_checkpoint(Path(self.path))
        verify_checkpoint(checkpoint)
        if read_state(checkpoint).get("base"):
            raise ValueError(
                f"weights.path={self.path}: holds adapters, not a whole model; export it merged (llmtrain export "
                f"{self.path} to=DIR) and take that: weights=huggingface weights.path=DIR"
            )
        return checkpoint

    def fingerprint(self) -> str:
        return weights_digest(locate_checkpoint(Path(self.path)))
