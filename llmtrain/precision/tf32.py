"""fp32 storage, TensorFloat-32 matrix products."""

from dataclasses import dataclass

import torch

from llmtrain.precision import Precision, PrecisionConfig


@dataclass(frozen=True)
class TF32(PrecisionConfig):
    """Matrix products with a 10-bit mantissa on the tensor cores of NVIDIA Ampere and later."""

    def build(self, device: torch.device) -> Precision:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise ValueError(f"tf32 needs an NVIDIA GPU, Ampere or later, not {device}; take precision=fp32 or bf16")
        return Precision("tf32", device, matmul="high")
