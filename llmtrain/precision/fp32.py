"""IEEE single precision throughout."""

from dataclasses import dataclass

import torch

from llmtrain.precision import Precision, PrecisionConfig

EXACT = 2e-6  # relative error of an fp32 matrix product; bf16 anywhere inside makes it 2e-3


@dataclass(frozen=True)
class FP32(PrecisionConfig):
    """True fp32 matrix products."""

    def build(self, device: torch.device) -> Precision:
        return Precision("fp32", device, matmul=exact_matmul() if device.type == "cpu" else "highest")


def exact_matmul() -> str:
    """Choose the fastest setting of torch for matrix products on this CPU that keeps fp32 accuracy.

    "medium" uses oneDNN, which is twice as fast as MKL on an AMD CPU, and is allowed to round to bf16.  With AMX it
    does, on other CPUs it does not, so the error is measured.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 384, generator=generator)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        error = (a @ b - exact).norm() / exact.norm()
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if error < EXACT else "highest"
