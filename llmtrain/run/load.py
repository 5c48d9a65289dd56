"""The model of a checkpoint, put together to be used."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.base.run_files import CONFIG, MODEL
from llmtrain.base.runtime import Runtime
from llmtrain.checkpoint.format import read_state, verify_checkpoint
from llmtrain.checkpoint.model_state import restore_model
from llmtrain.config import stored_config
from llmtrain.config.assemble import build_unit, check_base
from llmtrain.config.older_versions import complete
from llmtrain.config.run_config import RunConfig
from llmtrain.model import LanguageModel
from llmtrain.objective import TrainingUnit
from llmtrain.precision import Precision
from llmtrain.tokenizer import Tokenizer
from llmtrain.train.state import TrainState


@dataclass(frozen=True)
class LoadedModel:
    """The model of a checkpoint, with what it takes to use it."""

    run: RunConfig
    tokenizer: Tokenizer
    unit: TrainingUnit  # in evaluation mode, adapters and the weights that they were trained on put together
    state: TrainState
    device: torch.device
    precision: Precision  # for inference

    @property
    def model(self) -> LanguageModel:
        """The model without what the objective adds to it."""
        return self.unit.model


@contextlib.contextmanager
def load_model(
    checkpoint: Path, runtime: Runtime, *, base: str | None = None, plugins: Sequence[str] = ()
) -> Iterator[LoadedModel]:
    """Load the model of ``checkpoint``, for the length of a context.

    ``base``: where the weights are now that its adapters stand on; None: where they were.  Raises ValueError
    naming what does not fit, and :class:`CheckpointError` for a damaged checkpoint.
    """
    verify_checkpoint(checkpoint)
    values = complete(stored_config.untrusted(stored_config.load(checkpoint / CONFIG), plugins))
    state = TrainState.from_json(read_state(checkpoint))
    if base is not None:
        if not state.base:
            raise ValueError(f"base={base}: {checkpoint} holds a whole model, no adapters; leave it out")
        values["weights"] = {**values["weights"], "path": base}
    run = RunConfig.from_config(values)
    with runtime.session() as device:
        precision = run.precision.inference(device)
        tokenizer = run.tokenizer.build()
        check_base(run, state)
        generator = torch.Generator(device).manual_seed(0)
        unit = build_unit(run, run.vocab_size(tokenizer), state.labels, device, generator, load_weights=False)
        restore_model(unit, checkpoint / MODEL)
        unit.eval()
        with precision.arithmetic():
            yield LoadedModel(run, tokenizer, unit, state, device, precision)
