"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from dataclasses import dataclass

from llmtrain.lora.low_rank import LowRank


@dataclass(frozen=True)
class LoRA(LowRank):
    """``W x + (alpha / rank) B A x``."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank
