"""Loading the model of a checkpoint for inference."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.run_files import CONFIG
from llmtrain.base.runtime import Runtime, check_device
from llmtrain.checkpoint.directory import locate_checkpoint
from llmtrain.checkpoint.format import read_state, verify_checkpoint
from llmtrain.checkpoint.model_state import restore_model
from llmtrain.config import stored_config
from llmtrain.config.assemble import build_unit, check_base
from llmtrain.config.older_versions import complete
from llmtrain.config.run_config import RunConfig
from llmtrain.model import LanguageModel
from llmtrain.objective import TrainingUnit
from llmtrain.precision import Precision
from llmtrain.run.places import find_places, move
from llmtrain.run.tokenizer_copy import stored_tokenizer
from llmtrain.tokenizer import Tokenizer
from llmtrain.train.state import TrainState, parse_state


@dataclass(frozen=True)
class LoadedModel:
    """The model of a checkpoint, with its run, tokenizer and device."""

    run: RunConfig
    tokenizer: Tokenizer
    unit: TrainingUnit  # in evaluation mode, with adapters on the weights that they were trained on
    state: TrainState
    device: torch.device
    precision: Precision  # for inference

    @property
    def model(self) -> LanguageModel:
        """The model without the heads that the objective adds."""
        return self.unit.model


@dataclass(frozen=True)
class MovedFiles:
    """The present place of files that a stored run names; None: not moved."""

    path: str | None


@contextlib.contextmanager
def load_model(
    checkpoint: Path,
    runtime: Runtime,
    *,
    base: str | None = None,
    tokenizer_path: str | None = None,
    plugins: Sequence[str] = (),
) -> Iterator[LoadedModel]:
    """Load the model of ``checkpoint``, for the duration of a context.

    ``base``: the present place of the weights that its adapters were trained on, ``tokenizer_path`` that of the files
    of its tokenizer, for a run without a copy of them; None: not moved.  Raises ValueError naming the settings that do
    not fit, and :class:`CheckpointError` for a damaged checkpoint.
    """
    verify_checkpoint(checkpoint)
    stored = find_places(stored_config.load(checkpoint / CONFIG), checkpoint)
    values = complete(stored_config.untrusted(stored, plugins))
    state = parse_state(checkpoint, read_state(checkpoint))
    if base is not None and not state.base:
        raise ValueError(f"weights.path={base}: {checkpoint} holds a whole model, no adapters; leave it out")
    values = move(values, base, tokenizer_path)
    run = RunConfig.from_config(values)
    with runtime.session() as device:
        precision = run.precision.inference(device)
        tokenizer = run.build_tokenizer(stored_tokenizer(run.tokenizer, checkpoint, named=tokenizer_path is not None))
        check_base(run, state)
        generators = NamedGenerators(run.runtime.seed)
        unit = build_unit(run, run.vocab_size(tokenizer), state.labels, device, generators, load_weights=False)
        restore_model(unit, checkpoint)
        unit.eval()
        with precision.arithmetic():
            yield LoadedModel(run, tokenizer, unit, state, device, precision)


@dataclass(frozen=True)
class InferenceSettings:
    """The settings that commands with a trained model share."""

    weights: MovedFiles
    tokenizer: MovedFiles
    device: str
    plugins: list[str]

    def __post_init__(self) -> None:
        check_device(self.device)

    def load(self, target: Path) -> contextlib.AbstractContextManager[LoadedModel]:
        """Load the model of a run or checkpoint on the device, for the duration of a context."""
        runtime = Runtime.for_inference(self.device)
        return load_model(
            locate_checkpoint(target), runtime, base=self.weights.path, tokenizer_path=self.tokenizer.path,
            plugins=self.plugins,
        )  # fmt: skip
