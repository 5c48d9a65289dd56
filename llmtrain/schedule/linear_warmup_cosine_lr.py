"""The schedule of LAVIS, used to train BLIP and its successors.

Li et al. 2022, https://arxiv.org/abs/2209.09019; ``lavis/common/optims.py``.
"""

import math
from dataclasses import dataclass

from llmtrain.base.checks import non_negative, positive
from llmtrain.schedule import Schedule


@dataclass(frozen=True)
class LinearWarmupCosineLR(Schedule):
    """Linear warm-up from ``warmup_lr`` to ``init_lr``, then a cosine over the whole run down to ``min_lr``.

    ``min_lr + (init_lr - min_lr) * (1 + cos(pi * step / total)) / 2 * lr_decay_rate ** (step / total)``

    Progress counts from the start of the run, not from the end of the warm-up.  In LAVIS the cosine changes once an
    epoch, and the first epoch has the warm-up and then ``init_lr``; so it is here with ``epochs``, the number of epochs
    into which the run is divided.  Without, the cosine follows every step: the same as LAVIS at the start of each epoch
    but the first, and between these lower; the rate steps down a little at the end of the warm-up.

    LAVIS has ``lr_decay_rate`` but its cosine does not read it: 1.0 is LAVIS, and a smaller rate also decays the cosine
    exponentially, to that share of it at the end.  ``init_lr`` replaces ``peak``, which is not read.
    """

    init_lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    lr_decay_rate: float
    epochs: int | None

    def __post_init__(self) -> None:
        positive(lr_decay_rate=self.lr_decay_rate, epochs=self.epochs)
        non_negative(init_lr=self.init_lr, min_lr=self.min_lr, warmup_lr=self.warmup_lr, warmup_steps=self.warmup_steps)
        if self.lr_decay_rate > 1:
            raise ValueError(f"lr_decay_rate={self.lr_decay_rate}: must not exceed 1")
        for key in ("min_lr", "warmup_lr"):
            if (value := getattr(self, key)) > self.init_lr:
                raise ValueError(f"{key}={value}: must not exceed init_lr={self.init_lr}")

    def __call__(self, step: int, *, peak: float, total: int) -> float:
        step = min(step, total - 1)
        if self.epochs is None:
            is_warming, progress = step < self.warmup_steps, step / total
        else:
            epoch = step * self.epochs // total
            is_warming, progress = epoch == 0, epoch / self.epochs
        if is_warming:
            done = min(step / max(self.warmup_steps, 1), 1.0)
            return self.warmup_lr + (self.init_lr - self.warmup_lr) * done
        cosine = (self.init_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        return cosine * self.lr_decay_rate**progress + self.min_lr

    def warmup(self, total: int) -> int:
        return self.warmup_steps
