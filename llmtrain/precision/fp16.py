"""float16 matrix products with dynamic loss scaling."""

from dataclasses import dataclass

import torch

from llmtrain.base.options import RunFacts
from llmtrain.precision import LossScaler, Precision, PrecisionConfig


@dataclass(frozen=True)
class FP16(PrecisionConfig):
    """For GPUs before Ampere, which have no bf16."""

    initial_scale: float
    growth_interval: int

    def __post_init__(self) -> None:
        if self.initial_scale < 1:
            raise ValueError(f"initial_scale={self.initial_scale}: must be at least 1")
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval={self.growth_interval}: must be at least 1")

    def build(self, device: torch.device) -> Precision:
        scaler = LossScaler(device, self.initial_scale, self.growth_interval)
        return Precision("fp16", device, torch.float16, scaler=scaler)

    def unread(self, run: RunFacts) -> dict[str, str]:
        if self.growth_interval <= run.steps:
            return {}
        return {"growth_interval": f"{run.end}, before the loss scale can grow; precision.growth_interval={run.tenth}"}
