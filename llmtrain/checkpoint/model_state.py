"""The model in a checkpoint: the tensors that are saved, and their restoration."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llmtrain.base.tensor_files import CheckpointError, read_tensors
from llmtrain.objective import TrainingUnit


def saved_tensors(unit: TrainingUnit) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds of ``unit``: all, or those that are trained beside frozen weights."""
    tensors = unit.weights_state()
    if not unit.has_base:
        return tensors
    trained = {name for name, _ in unit.trained_weights()}
    return {name: tensor for name, tensor in tensors.items() if name in trained}


def restore_model(unit: TrainingUnit, path: Path) -> None:
    """Copy every tensor of the file ``path`` into ``unit``; they must be exactly those of :func:`saved_tensors`."""
    tensors = read_fitting(path, saved_tensors(unit))
    unit.load_weights(tensors, strict=not unit.has_base)


def read_fitting(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file ``path``, on the device of those ``expected``.

    Raises :class:`CheckpointError` unless names and shapes are the same.
    """
    device = next(iter(expected.values())).device if expected else "cpu"
    tensors = read_tensors(path, device)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in shapes if name not in found]
    problems += [f"{name} is not in this model" for name in found if name not in shapes]
    problems += [
        f"{name} is {found[name]}, this model's is {shape}"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(problems[:3])}{more}")
    return tensors
