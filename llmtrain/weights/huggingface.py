"""The weights of a checkpoint directory in Hugging Face's format."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.checkpoint.own_parts import OwnParts
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

    takes_parts: ClassVar[bool] = True

    def load(self, model: LanguageModel) -> None:
        load_weights(model, locate_directory(self.path))

    def load_parts(self, model: LanguageModel, parts: OwnParts) -> None:
        load_weights(model, locate_directory(self.path), into=parts)

    def fingerprint(self) -> str:
        return fingerprint(locate_directory(self.path))
