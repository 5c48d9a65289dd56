"""Every resumable fact of a run that is not a tensor of the model or the optimizer."""

import base64
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.base.places import Places
from llmtrain.base.run_files import STATE
from llmtrain.base.stored_files import build_typed
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.model_state import NO_PLACES, NO_WEIGHTS
from llmtrain.checkpoint.restore import restore
from llmtrain.objective import TrainingUnit

FORMAT = 2


@dataclass
class TrainState:
    """The state of a run besides its tensors.  Saved as ``state.json`` in each checkpoint."""

    step: int = 0  # optimizer steps done, skipped ones included
    position: int = 0  # sequences consumed, over all epochs: the position in the data order
    tokens: int = 0  # consumed, without padding
    refused_steps: int = 0  # skipped steps: the update was not finite, or far out of the ordinary
    skipped_sequences: int = 0  # left out by the recovery; ``position`` counts them as consumed
    short_sequences: int = 0  # by which last steps were smaller, to end with a whole pass; see train/length.py
    micro_batch_size: int | None = None  # found to fit, at the start or after memory ran out; None: the config's
    compiled: bool | None = None  # True if the blocks are compiled; None: not decided yet
    best_val_loss: float | None = None
    best_val_step: int | None = None
    train_seconds: float = 0.0  # spent in steps, over all sessions
    data: str = ""  # fingerprint of the data that ``position`` refers to
    labels: list[str] = field(default_factory=list)  # names of the model's classes
    base: str = ""  # fingerprint of the frozen weights that adapters were trained on, and that no checkpoint holds
    scaler: dict[str, float] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=dict)

    def capture_rng(self, device: torch.device) -> None:
        """Store the state of every random number generator that training draws from."""
        version, internal, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        self.rng = {
            "python": [version, list(internal), gauss],
            "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
            "torch": _encode(torch.get_rng_state()),
        }
        if device.type == "cuda":
            self.rng["cuda"] = _encode(torch.cuda.get_rng_state(device))

    def restore_rng(self, device: torch.device) -> None:
        """Continue every generator where :meth:`capture_rng` left it."""
        if not self.rng:
            return
        try:
            version, internal, gauss = self.rng["python"]
            random.setstate((version, tuple(internal), gauss))
            name, keys, position, has_gauss, cached = self.rng["numpy"]
            np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
            torch.set_rng_state(_decode(self.rng["torch"]))
            if device.type == "cuda" and "cuda" in self.rng:
                torch.cuda.set_rng_state(_decode(self.rng["cuda"]), device)
        except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"state.json: rng is no state of random number generators ({error})") from error

    def to_json(self) -> dict[str, Any]:
        """A value for ``json.dump``."""
        return {"format": FORMAT, **asdict(self)}

    def micro_batch_of(self, configured: int) -> int:
        """Sequences of a forward pass at most: the size found to fit, else ``configured``."""
        return self.micro_batch_size or configured

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """The inverse of :meth:`to_json`.

        Raises ValueError for a format that this version does not know, and for values of other types.
        """
        value = dict(value)
        if (found := value.pop("format", None)) != FORMAT:
            raise ValueError(f"format {found!r} of the training state is not known here (this version: {FORMAT})")
        state = build_typed(cls, value, "the training state")
        if min(state.step, state.position, state.tokens) < 0 or (state.micro_batch_size or 1) < 1:
            raise ValueError("the training state: step, position, tokens and micro_batch_size cannot be negative")
        return state


def restore_state(
    path: Path,
    unit: TrainingUnit,
    optimizer: torch.optim.Optimizer,
    *,
    fresh_optimizer: bool = False,
    weights: Mapping[str, torch.Tensor] = NO_WEIGHTS,
    places: Places = NO_PLACES,
) -> TrainState:
    """Fill ``unit`` and ``optimizer`` from the checkpoint at ``path``, known to be intact, and return its state.

    With ``fresh_optimizer`` the optimizer keeps its own state, for an optimizer that is not the checkpoint's.
    ``weights`` and ``places``: the parts that this rank holds, see :func:`restore`.
    Raises :class:`CheckpointError` naming the file.
    """
    state = restore(path, unit, optimizer, fresh_optimizer=fresh_optimizer, weights=weights, places=places)
    return parse_state(path, state)


def parse_state(path: Path, values: dict[str, Any]) -> TrainState:
    """The state of the checkpoint at ``path``, whose ``state.json`` holds ``values``.

    Raises :class:`CheckpointError` naming the file, also where it is the state of another step than the folder's.
    """
    try:
        state = TrainState.from_json(values)
        if re.fullmatch(r"step-\d+", path.name) and step_of(path) != state.step:
            raise ValueError(f"of step {state.step}, in the checkpoint of step {step_of(path)}")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path / STATE}: {error}") from error
    return state


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
