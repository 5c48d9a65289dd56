"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from dataclasses import dataclass

from llmtrain.lora.low_rank import LowRankAdaptation


@dataclass(frozen=True)
class LoRA(LowRankAdaptation):
    """``W x + (alpha / rank) B A x``."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank
