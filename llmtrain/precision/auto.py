"""Fastest arithmetic that trains like fp32."""

from dataclasses import dataclass

import torch

from llmtrain.precision import Precision, PrecisionConfig
from llmtrain.precision.bf16 import BF16
from llmtrain.precision.fp32 import FP32


@dataclass(frozen=True)
class Auto(PrecisionConfig):
    """bf16 where the device computes in it natively, else fp32."""

    def build(self, device: torch.device) -> Precision:
        return (BF16() if has_native_bf16(device) else FP32()).build(device)


def has_native_bf16(device: torch.device) -> bool:
    """Return True if ``device`` multiplies bf16 in hardware (on a CPU: AVX512-BF16 or AMX, not emulation)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
