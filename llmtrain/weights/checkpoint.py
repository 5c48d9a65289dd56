"""The weights of another run."""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.model import LanguageModel
from llmtrain.storage import MODEL, CheckpointError, locate_checkpoint, read_tensors, verify_checkpoint
from llmtrain.weights import Weights


@dataclass(frozen=True)
class Checkpoint(Weights):
    """The model of a run or checkpoint directory; its optimizer, step and data position stay behind."""

    path: str

    def load(self, model: LanguageModel) -> None:
        checkpoint = locate_checkpoint(Path(self.path))
        verify_checkpoint(checkpoint)
        load_model(model, checkpoint / MODEL)


def load_model(model: LanguageModel, path: Path) -> None:
    """Copy every tensor of ``path`` into ``model``; names and shapes must match to the last one."""
    device = next(model.parameters()).device
    tensors = read_tensors(path, device)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
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
    model.load_state_dict(tensors)
