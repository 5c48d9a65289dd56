"""Fastest arithmetic that trains like fp32."""

from dataclasses import dataclass

import torch

from llmtrain.base.device import has_native_bf16
from llmtrain.base.gpus import find_gpu
from llmtrain.precision import Precision, PrecisionConfig, Residual
from llmtrain.precision.bf16 import BF16
from llmtrain.precision.fp32 import FP32


@dataclass(frozen=True)
class Auto(PrecisionConfig):
    """bf16 where the device computes in it natively, else fp32."""

    residual: Residual

    @property
    def has_low_residual(self) -> bool:
        return self.residual is Residual.bf16

    def build(self, device: torch.device) -> Precision:
        if has_native_bf16(device):
            return BF16(self.residual).build(device)
        precision = FP32().build(device)
        notices = [fp16_notice(device)] if device.type == "cuda" else []
        if self.has_low_residual:
            notices.append("precision.residual=bf16 has no effect on a device without bf16")
        precision.notice = "; ".join(notices)
        return precision


def fp16_notice(device: torch.device) -> str:
    """The reason why ``auto`` is fp32 on a GPU, and the gain of fp16 there."""
    name = torch.cuda.get_device_name(device)
    gpu = find_gpu(name)
    known = gpu is not None and {"fp16", "fp32"} <= gpu.flops.keys()
    gain = f"{gpu.flops['fp16'] / gpu.flops['fp32']:.0f} times" if known else "several times"  # type: ignore[union-attr]
    return f"auto is fp32 here: {name} has no bf16; precision=fp16 multiplies {gain} as fast"
