"""bfloat16 matrix products."""

from dataclasses import dataclass

import torch

from llmtrain.precision import Precision, PrecisionConfig


@dataclass(frozen=True)
class BF16(PrecisionConfig):
    """bf16 has the range of fp32, so it needs no loss scaling."""

    def build(self, device: torch.device) -> Precision:
        return Precision("bf16", device, torch.bfloat16)
