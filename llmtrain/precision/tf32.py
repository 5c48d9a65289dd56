"""fp32 storage, TensorFloat-32 matrix products."""

from dataclasses import dataclass

import torch

from llmtrain.precision import Precision, PrecisionConfig
from llmtrain.precision.fp32 import FP32


@dataclass(frozen=True)
class TF32(PrecisionConfig):
    """Matrix products with a 10-bit mantissa on the tensor cores of NVIDIA Ampere and later."""

    def build(self, device: torch.device) -> Precision:
        if not _has_tf32(device):
            place = "an AMD GPU (ROCm)" if device.type == "cuda" and torch.version.hip else device
            raise ValueError(
                f"precision=tf32: needs an NVIDIA GPU, Ampere or later, not {place}; take precision=fp32 or bf16"
            )
        return Precision("tf32", device, matmul="high")

    def inference(self, device: torch.device) -> Precision:
        """Build true fp32 on devices without TF32."""
        return self.build(device) if _has_tf32(device) else FP32().build(device)


def _has_tf32(device: torch.device) -> bool:
    # torch gives AMD's GPUs compute capabilities too
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
