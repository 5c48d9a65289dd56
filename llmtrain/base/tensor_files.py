"""Tensors in safetensors files."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.  Raises :class:`CheckpointError` naming it."""
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
