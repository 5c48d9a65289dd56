"""A GPU as torch reports it, on a machine without one; nothing can compute on it."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA H200", memory_bytes: int = 10**11, count: int = 1
) -> list[torch.device]:
    """Let torch report ``count`` GPUs; returns the list of those that are made the current one, which grows."""
    entered: list[torch.device] = []

    def enter(device: torch.device) -> AbstractContextManager[None]:
        entered.append(device)
        return nullcontext()

    answers = {
        "is_available": lambda: True, "device_count": lambda: count, "current_device": lambda: 0, "device": enter,
        "get_device_name": lambda device=None: name, "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (memory_bytes, memory_bytes),
    }  # fmt: skip
    for function, answer in answers.items():
        monkeypatch.setattr(torch.cuda, function, answer)
    return entered
