"""bfloat16 matrix products."""

from dataclasses import dataclass

import torch

from llmtrain.precision import Precision, PrecisionConfig, Residual


@dataclass(frozen=True)
class BF16(PrecisionConfig):
    """bf16 has the range of fp32, so it needs no loss scaling."""

    residual: Residual

    @property
    def has_low_residual(self) -> bool:
        return self.residual is Residual.bf16

    def build(self, device: torch.device) -> Precision:
        precision = Precision("bf16", device, torch.bfloat16)
        if self.has_low_residual:
            precision.notice = "bf16 also in the residual stream and the norms"
        return precision
