"""The weights of another run."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmtrain.model import LanguageModel
from llmtrain.storage import (
    MANIFEST,
    MODEL,
    CheckpointError,
    locate_checkpoint,
    read_state,
    read_tensors,
    verify_checkpoint,
)
from llmtrain.weights import Weights


@dataclass(frozen=True)
class Checkpoint(Weights):
    """The model of a run or checkpoint directory; its optimizer, step and data position stay behind."""

    path: str

    def load(self, model: LanguageModel) -> None:
        checkpoint = locate_checkpoint(Path(self.path))
        verify_checkpoint(checkpoint)
        if read_state(checkpoint).get("base"):
            raise ValueError(
                f"weights.path={self.path}: holds adapters, not a whole model; export it merged (llmtrain export "
                f"{self.path} to=DIR) and take that: weights=huggingface weights.path=DIR"
            )
        load_model(model, checkpoint / MODEL)

    def fingerprint(self) -> str:
        manifest = json.loads((locate_checkpoint(Path(self.path)) / MANIFEST).read_text(encoding="utf-8"))
        return manifest["files"][MODEL]["sha256"]


def saved_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """What a checkpoint holds of ``model``: all of it, or what is trained beside frozen weights from elsewhere."""
    tensors = model.state_dict()
    if not model.has_base:
        return tensors
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in tensors.items() if name in trained}


def load_model(model: LanguageModel, path: Path) -> None:
    """Copy every tensor of ``path`` into ``model``: those that :func:`saved_tensors` names, to the last one."""
    device = next(model.parameters()).device
    tensors = read_tensors(path, device)
    expected = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in this model" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, this model's is {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(tensors, strict=not model.has_base)
