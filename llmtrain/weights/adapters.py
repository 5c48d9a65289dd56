"""Initial adapters from a PEFT directory, a run or a checkpoint."""

from pathlib import Path

from llmtrain.base.options import option_of_target
from llmtrain.base.run_files import CONFIG as STORED
from llmtrain.base.stored_yaml import read_yaml
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import locate_checkpoint
from llmtrain.checkpoint.format import read_state, verify_checkpoint
from llmtrain.checkpoint.stored_tensors import group_file, read_group
from llmtrain.hf import CLASSIFIER, SCORE
from llmtrain.hf.families import module_names
from llmtrain.hf.peft import CONFIG, check_kind, import_adapter
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.objective import TrainingUnit


def start_from(unit: TrainingUnit, lora: LowRankAdaptation, path: Path) -> None:
    """Copy adapters, those of a PEFT directory or of one of our runs or checkpoints, into those of ``unit``.

    Raises ValueError, naming keys or tensors, for adapters that differ from those that ``lora`` added to the model.
    """
    if (path / CONFIG).is_file():
        names = module_names(unit.model) | {CLASSIFIER.removesuffix(".weight"): SCORE.removesuffix(".weight")}
        import_adapter(unit, lora, names, path)
        return
    checkpoint = locate_checkpoint(path)
    verify_checkpoint(checkpoint)
    if not read_state(checkpoint).get("base"):
        raise ValueError(
            f"lora.path={path}: holds a whole model, no adapters; take weights=checkpoint weights.path={path}"
        )
    stored = read_yaml(checkpoint / STORED).get("lora")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{checkpoint / STORED}: lora is no option of that group")
    kind = option_of_target(str(stored.get("_target_")))
    check_kind(lora, kind, stored.get("rank"), stored.get("alpha"), path)
    tensors = read_group(checkpoint, "model", next(unit.parameters()).device)
    trained = {name for name, _ in unit.trained_weights()}
    shapes = {name: tuple(tensor.shape) for name, tensor in unit.weights_state().items() if name in trained}
    others = [name for name in (*shapes, *tensors) if name not in tensors or name not in shapes]
    others += [name for name in tensors if name in shapes and tuple(tensors[name].shape) != shapes[name]]
    if others:
        more = f" (and {len(others) - 3} more)" if len(others) > 3 else ""
        raise CheckpointError(
            f"{group_file(checkpoint, 'model')}: does not fit lora.targets and lora.also_train: "
            f"{', '.join(others[:3])}{more} "
            "missing, unexpected or of another shape"
        )
    unit.load_weights(tensors, strict=False)
