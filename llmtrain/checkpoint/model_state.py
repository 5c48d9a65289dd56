"""The model in a checkpoint: which of its tensors are saved, and how they are read back."""

from pathlib import Path

from torch import Tensor

from llmtrain.base.tensor_files import CheckpointError, read_tensors
from llmtrain.model import LanguageModel


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
