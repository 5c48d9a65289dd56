"""Linear decay after a linear warm-up, the schedule of BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805)."""

from dataclasses import dataclass

from llmtrain.schedule.warmup import WarmupDecay


@dataclass(frozen=True)
class WarmupLinear(WarmupDecay):
    """``min_lr + (peak - min_lr) * (1 - progress)``, progress = (step - warmup) / (total - warmup)."""

    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        progress = (step - warmup) / (total - warmup)
        return self.min_lr + (peak - self.min_lr) * (1 - progress)
