"""The ``runtime`` group: device, threads, seeds and allocator of the process that trains.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Self

from llmtrain.base.options import Option
from llmtrain.base.process import Allocator
from llmtrain.base.threads import default_threads

if TYPE_CHECKING:
    import torch


class Device(Enum):
    """The device to train on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Runtime(Option):
    """The ``runtime`` group."""

    device: Device
    seed: int
    deterministic: bool
    compile: bool | str
    cuda_graphs: bool
    profile: bool
    num_threads: int | None
    allocator: Allocator  # in force before this is built: see llmtrain.cli.start

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads={self.num_threads}: must be at least 1, or null for one per physical core")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be between 0 and 2**63 - 1")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile={self.compile}: must be auto, true or false")
        if self.cuda_graphs and self.compile is not True:
            raise ValueError(f"cuda_graphs=true: needs compile=true, not compile={str(self.compile).lower()}")

    @classmethod
    def for_inference(cls, device: Device) -> Self:
        """Build the settings of a program that does not train."""
        return cls(device, 0, False, False, False, False, None, Allocator.tuned)

    def torch_device(self) -> torch.device:
        """Return the device.  Raises ValueError if this machine does not have it."""
        import torch

        if self.device is Device.cuda and not torch.cuda.is_available():
            raise ValueError("device=cuda: torch sees no CUDA device here; take runtime.device=cpu or auto")
        use_cuda = self.device is not Device.cpu and torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")

    @contextmanager
    def session(self, recorded_threads: int | None = None) -> Iterator[torch.device]:
        """Set threads and determinism for the duration of a run; yields the device.

        ``recorded_threads``: of the run that continues, which keeps their number unless ``num_threads`` is given: the
        sums of a step depend on it in their last bits.
        """
        import torch

        device = self.torch_device()
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        torch.set_num_threads(self.num_threads or recorded_threads or default_threads())
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS creates its first handle
            torch.use_deterministic_algorithms(True)
        try:
            yield device
        finally:
            torch.set_num_threads(threads)
            if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it imports torch's compiler
                torch.use_deterministic_algorithms(deterministic)

    def seed_everything(self) -> None:
        """Seed every global generator (Python, NumPy, torch on all devices)."""
        import random

        import numpy as np
        import torch

        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)
