"""IEEE single precision throughout."""

from dataclasses import dataclass

import torch

from llmtrain.precision import Precision, PrecisionConfig


@dataclass(frozen=True)
class FP32(PrecisionConfig):
    """True fp32 matrix products."""

    def build(self, device: torch.device) -> Precision:
        return Precision("fp32", device)
