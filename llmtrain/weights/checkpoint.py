"""The weights of another run."""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.directory import locate_checkpoint
from llmtrain.checkpoint.format import read_state, verify_checkpoint, weights_digest
from llmtrain.checkpoint.model_state import read_fitting
from llmtrain.model import LanguageModel
from llmtrain.weights import Weights


@dataclass(frozen=True)
class Checkpoint(Weights):
    """The model of a run or checkpoint directory; without its optimizer state, step and data position."""

    path: str

    def load(self, model: LanguageModel) -> None:
        checkpoint = locate_checkpoint(Path(self.path))
        verify_checkpoint(checkpoint)
        if read_state(checkpoint).get("base"):
            raise ValueError(
                f"weights.path={self.path}: holds adapters, not a whole model; export it merged (llmtrain export "
                f"{self.path} to=DIR) and take that: weights=huggingface weights.path=DIR"
            )
        model.load_state_dict(read_fitting(checkpoint, model.state_dict()))

    def fingerprint(self) -> str:
        return weights_digest(locate_checkpoint(Path(self.path)))
