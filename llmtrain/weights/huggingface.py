"""The weights of a checkpoint directory in Hugging Face's format."""

from dataclasses import dataclass

from llmtrain.hf.directory import fingerprint, locate_directory
from llmtrain.hf.reading import load_weights
from llmtrain.model import LanguageModel
from llmtrain.weights import Weights


@dataclass(frozen=True)
class HuggingFace(Weights):
    """A directory that ``save_pretrained`` wrote, or a model of the hub, as ``org/name`` or ``org/name@revision``.

    Only safetensors, in one file or several.  A pickle is refused; no code that comes with a checkpoint is run.
    """

    path: str

    def load(self, model: LanguageModel) -> None:
        load_weights(model, locate_directory(self.path))

    def fingerprint(self) -> str:
        return fingerprint(locate_directory(self.path))
