"""The ``runtime`` group: device, threads, seeds and allocator of the process that trains.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from llmtrain.base.device import missing_cuda_reason
from llmtrain.base.options import Option
from llmtrain.base.process import Allocator
from llmtrain.base.threads import default_threads

if TYPE_CHECKING:
    import torch


DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
OTHER_GPUS = {"mps": "an Apple GPU", "xpu": "an Intel GPU"}


def check_device(device: str) -> None:
    """Raise ValueError unless ``device`` is auto, cpu, cuda or cuda:N."""
    if DEVICE.fullmatch(device):
        return
    if kind := OTHER_GPUS.get(device.partition(":")[0]):
        raise ValueError(f"device={device}: {kind} is not supported; take cpu, or auto for the best device that is")
    hint = "; did you mean cuda?" if device in ("gpu", "nvidia", "hip", "rocm") else ""
    raise ValueError(f"device={device}: must be one of auto, cpu, cuda, or cuda:1 for the second GPU{hint}")


@dataclass(frozen=True)
class Runtime(Option):
    """The ``runtime`` group."""

    device: str  # as check_device takes it
    seed: int
    deterministic: bool
    compile: bool | str
    cuda_graphs: bool
    profile: bool
    num_threads: int | None
    allocator: Allocator  # in force before this is built: see llmtrain.cli.start

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads={self.num_threads}: must be at least 1, or null for one per physical core")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be between 0 and 2**63 - 1")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile={self.compile}: must be auto, true or false")
        if self.cuda_graphs and self.compile is not True:
            raise ValueError(f"cuda_graphs=true: needs compile=true, not compile={str(self.compile).lower()}")

    @classmethod
    def for_inference(cls, device: str) -> Self:
        """Build the settings of a program that does not train."""
        return cls(device, 0, False, False, False, False, None, Allocator.auto)

    def torch_device(self) -> torch.device:
        """Return the device, a GPU with its number.  Raises ValueError if this machine does not have it."""
        import torch

        if self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            reason = missing_cuda_reason() or "torch sees no CUDA device here"
            raise ValueError(f"device={self.device}: {reason}; take cpu or auto")
        _, _, number = self.device.partition(":")
        count = torch.cuda.device_count()
        if number and int(number) >= count:
            there = "one GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
            raise ValueError(f"device={self.device}: torch sees {there}{limit}; take one of these")
        return torch.device("cuda", int(number) if number else torch.cuda.current_device())

    @contextmanager
    def session(self, recorded_threads: int | None = None, *, ranks_here: int = 1) -> Iterator[torch.device]:
        """Set threads, determinism and the current GPU for the duration of a run; yields the device.

        ``ranks_here``: processes of the run on this machine, which share its cores.

        ``recorded_threads``: of the run that continues, which keeps their number unless ``num_threads`` is given: the
        sums of a step depend on it in their last bits.
        """
        import torch

        device = self.torch_device()
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        filling: Any = torch.utils.deterministic  # torch replaces its module by one with this property
        fills = filling.fill_uninitialized_memory
        torch.set_num_threads(self.num_threads or recorded_threads or max(default_threads() // ranks_here, 1))
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS creates its first handle
            torch.use_deterministic_algorithms(True)
            filling.fill_uninitialized_memory = False  # every tensor; nothing here reads one unwritten
        try:
            with ExitStack() as stack:
                if device.type == "cuda":  # for what takes the current one: streams, events, kernels of Triton
                    stack.enter_context(torch.cuda.device(device))
                yield device
        finally:
            filling.fill_uninitialized_memory = fills
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
